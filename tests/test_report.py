"""The page of a run: what is on it, that it needs nothing but itself, and that nothing in a run can get out of its text."""

import html
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import helps, refused, worked

from src.core import artifact
from src.core.errors import ConfigError, MissingInput
from src.report import page, plots, run

HOSTILE = "</pre><script>alert('x')</script>\x1b[2J\u202e"


def told(page_text: str) -> str:
    """The page without the plots' library and data."""
    return re.sub(r"<script.*?</script>", "", page_text, flags=re.S)


@pytest.fixture
def reported(road):
    """The finished run with a report of the merge that has rows and answers."""
    rows = [json.loads(line) for line in (road / "a" / "data" / "val.jsonl").read_text().splitlines()]

    def work(cfg, inputs, out: Path) -> dict:
        shift = 0.5 if cfg.run == "b" else 0.0
        told = [
            {
                "of": "validation",
                "id": r["id"],
                "tokens": 5 + i,
                "loss": 1.0 + i / 10 + shift,
                "parent_loss": 1.2,
                "loss_difference": i / 10 - 0.2 + shift,
            }
            for i, r in enumerate(rows)
        ]
        (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
        answers = [{"by": by, "prompt": f"Hi {HOSTILE}", "answer": f"{by} says hi"} for by in ("parent", "model")]
        answers += [
            {"by": "model", "prompt": "Hi", "before": [{"role": "system", "content": c}], "answer": c} for c in ("Be kind.", "Be brief.")
        ]
        (out / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        (out / "report.json").write_text("{}\n")
        return {"perplexity": 2.5, "loss": 0.9, "kl": 0.01, "intervals": {"perplexity": [2.0, 3.0], "kl": None}, "evidence": {}}

    for name in ("a", "b"):
        if name == "b":
            for kept in ("data", "finetune", "merge"):
                artifact.link(artifact.open_artifact(road / "a" / kept), road / "b" / kept)
        worked("evaluate", work, f"run={name}", f"outputs={road}", f"source={road / name / 'merge'}", "force=true", "evaluation.samples=3")
    return road


def test_a_page_tells_the_run_and_needs_nothing_but_itself(call, reported):
    done = call("report", "a")
    assert done.returncode == 0, done.stderr
    file = reported / "a" / "report.html"
    assert done.stdout.strip() == f"report: {file}"
    text = file.read_text()
    for name in ("data", "finetune", "merge", "quantize", "evaluate-merge", "deploy-llama2c"):
        assert name in told(text) and artifact.open_artifact(reported / "a" / name).key[:12] in told(text)
    assert "2.500" in told(text) and "2.000 to 3.000" in told(text)
    assert not re.findall(r"""(?:src|href)=["'](?!#)|@import|url\(""", told(text)), "nothing is fetched"
    assert len(text) < 1.5e6


def test_one_prompt_after_other_messages_is_another(reported):
    _, rows = run.answers(run.read(reported / "a"))
    assert [row["prompt"] for row in rows[1:]] == ["system: Be kind.\nHi", "system: Be brief.\nHi"]
    assert [list(row["by"].values()) for row in rows[1:]] == [["Be kind."], ["Be brief."]]


def test_what_is_trained_is_marked(reported):
    text = told(page.of([reported / "a"], 50))
    marked = [html.unescape(m) for m in re.findall(r"<mark>(.*?)</mark>", text, flags=re.S)]
    first = json.loads((reported / "a" / "data" / "train.jsonl").read_text().splitlines()[0])["messages"]
    assert marked[0].startswith(next(m["content"] for m in first if m["role"] == "assistant"))
    assert not any(m["content"] in "".join(marked[:1]) for m in first if m["role"] == "user" and len(m["content"]) > 20)


def test_nothing_in_a_run_gets_out_of_its_text(reported):
    text = page.of([reported / "a"], 50)
    assert "<script>alert" not in text and "\x1b" not in text and "\u202e" not in text
    assert html.escape("<script>alert", quote=False) in told(text)


def test_two_runs_are_compared_by_pairs_of_rows(call, reported):
    assert call("report", "a", "b").returncode == 0
    text = told((reported / "a" / "report-b.html").read_text())
    assert "+0.5000" in text and 'class="worse">worse' in text, "every row lost half a nat"
    same = page.comparison([run.read(reported / "a")] * 2, {})
    assert same["settings"] == [] and [line[4] for line in same["lines"]] == ["no evidence"]


def test_settings_that_differ_between_runs_are_told(reported, call):
    assert call("data", "run=c", "data.val=0.3", "data.calib=0.2", f"data.path={reported / 'inputs' / 'chats.json'}").returncode == 0
    found = page.comparison([run.read(reported / name) for name in ("a", "c")], {})
    assert ["data.data.val", "0.2000", "0.3000"] in found["settings"]


def test_the_commands_make_the_same_artifacts(call, road):
    """Each, as it is printed, finds its result up to date."""
    commands = run.commands(run.read(road / "a"))
    assert len(commands) == len(list(run.read(road / "a").artifacts))
    for command in commands:
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"]
        done = call(words[2].removeprefix("src."), *words[3:])
        assert done.returncode == 0 and "up to date" in done.stderr, f"{command}\n{done.stderr}"


@helps("report/__main__.py", "python -m src.report {}", "outputs=FOLDER names the folder that holds it", "python -m src.data starts one")
def test_a_run_that_is_not_there_is_refused(call, road, tmp_path):
    refused(call("report", "aa"), MissingInput, "no run 'aa'", "did you mean 'a'?", "python -m src.report a")
    refused(call("report", f"{road}/a"), ConfigError, "without a path")
    refused(call("report", f"outputs={tmp_path / 'none'}"), MissingInput, "no run 'default'", "python -m src.data")
    assert call("report", "a", f"outputs={road}").returncode == 0


def test_a_run_with_nothing_in_it_has_a_page(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "Nothing is finished yet" in page.of([tmp_path / "empty"], 10)


def test_long_curves_are_thinned_evenly():
    assert (
        plots.thinned(range(10_000))[0] == 0
        and plots.thinned(range(10_000))[-1] == 9_999
        and len(plots.thinned(range(10_000))) == plots.SHOWN
    )
    assert plots.thinned([1, 2]) == [1, 2]


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.slow
def test_a_browser_draws_every_plot_and_asks_for_nothing(call, reported, tmp_path):
    """Headless Chromium: no error on its console, a canvas for each plot, no request."""
    assert call("report", "a").returncode == 0
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000"]
    address = f"file://{reported / 'a' / 'report.html'}"

    def shown(page: str, width: int) -> tuple[subprocess.CompletedProcess, set[str]]:
        """(Chromium's account, the addresses it asked a network for)."""
        argv = ["chromium", *flags, "--enable-logging=stderr", f"--log-net-log={tmp_path / 'net.json'}", f"--window-size={width},900"]
        done = subprocess.run([*argv, "--dump-dom", page], capture_output=True, text=True, timeout=120)
        return done, set(re.findall(r'"url":"(https?://[^"?]+)', (tmp_path / "net.json").read_text()))

    _, its_own = shown("about:blank", 390)
    for width in (390, 1280):
        done, asked = shown(address, width)
        spoken = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "[bokeh" not in line]
        assert done.returncode == 0 and not spoken, spoken
        places = len(re.findall(r'data-root-id="', done.stdout))
        assert places >= 3 and "bk-Figure" in done.stdout
        assert not asked - its_own, "beside what a browser asks for by itself"
