// A page opened from disk may start no worker, so its search would find nothing. Here a worker of such a page is a script in a hidden frame.
// The search looks for the name IFrameWorker to learn that its own scripts come by tags of the frame.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.body.appendChild(Object.assign(document.createElement("iframe"), { hidden: true }))
      const inside = this.frame.contentWindow
      const load = src => new Promise((done, failed) => {
        const script = Object.assign(inside.document.createElement("script"), { src, onload: done, onerror: failed, async: false })
        inside.document.head.append(script)
      })
      inside.importScripts = (...urls) => Promise.all(urls.map(load))
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = load(url)
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
