"""The settings of every kind of target `deploy` and `plan` know. A board is a file in configs/target, a vendor one class here."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from src.settings.base import Settings, Unkeyed


class Board(Settings):
    """What is known of a device: for estimates and for the question whether a model fits. It changes nothing in a bundle."""

    npu_memory: PositiveFloat | None
    """GiB that the NPU's runtime can take for weights, KV cache and buffers; null: not known"""
    host_memory: PositiveFloat | None
    """GiB left to programs on the board's own processor, where the embedding table lives; null: not known"""
    bandwidth: PositiveFloat | None
    """GB/s at which weights stream while decoding, fitted to published speeds; null: not known"""
    bandwidth_4bit: PositiveFloat | None
    """GB/s at which weights of 4 bit stream, where unpacking them takes longer than reading them; null: as bandwidth"""
    kv_bandwidth: PositiveFloat | None
    """GB/s at which the KV cache is read; null: as bandwidth"""
    layer_ms: NonNegativeFloat | None
    """milliseconds a decoder layer costs per token beside its weights; null: not known"""
    prefill_layer_ms: NonNegativeFloat | None
    """milliseconds a decoder layer costs per chunk of the prompt beside its arithmetic; null: not known"""
    tera_ops: PositiveFloat | None
    """tera operations per second that products with weights reach in prefill, fitted to published times; null: not known"""
    tera_ops_4bit: PositiveFloat | None
    """the same with weights of 4 bit, which are unpacked first; null: as tera_ops"""
    attention_tera_ops: PositiveFloat | None
    """the same of attention, each chunk of the prompt against itself and all before it; null: as tera_ops"""
    onchip_tokens: PositiveInt | None
    """tokens of a chunk whose activations fit into the NPU's own memory; null: any chunk"""
    spilled_tera_ops: PositiveFloat | None
    """tera operations per second for the tokens of a chunk beyond those; null: as tera_ops"""
    kv_copy: PositiveFloat | None
    """GB/s at which a host copies keys and values in prefill, where the NPU is a card on PCIe; null: nothing is copied"""


class Target(Settings):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    """name of the target; its bundle is deploy-<name>"""


class Llama2c(Target):
    kind: Literal["llama2c"]
    """a CPU bundle in the formats of karpathy/llama2.c, or one of our own, with a C program to run it"""
    format: Literal["fp32_v0", "fp32_v1", "int8_v2", "fp32_v3", "int8_v3", "int4_v3"]
    """weight file: what llama2.c's run reads (fp32_v0), its newer header (fp32_v1), what its runq reads (int8_v2), or our own for all that these
    cannot hold (fp32_v3, int8_v3, int4_v3)"""
    group_size: PositiveInt
    """integers that share a scale; halved until it divides the model's sizes"""


class Axera(Target):
    kind: Literal["axera"]
    """an AXERA NPU, through Pulsar2's llm_build or llm_build2"""
    chip: str
    """what Pulsar2 calls the chip: AX650 (AX650A, AX650N, AX8850), AX620E (AX630C, AX631), or another that the installed version lists"""
    weight_type: Literal["auto", "s8", "s4", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"]
    """type of the weights on the NPU; auto: s8, or what a GPTQ model was quantized to"""
    hidden_type: Literal["bf16", "fp16", "fp32"]
    """type of activations and KV cache"""
    prefill_chunk: Literal[32, 64, 128, 256, 512]
    """prompt tokens the NPU takes at once"""
    prompt_len: PositiveInt
    """longest prompt in tokens, a multiple of prefill_chunk"""
    context_len: PositiveInt
    """prompt and answer together in tokens, above prompt_len and within the model's own limit"""
    last_kv_cache_len: Annotated[list[PositiveInt], Field(min_length=1)] | None
    """histories in tokens that llm_build makes prefill graphs for, ascending to prompt_len; null: each multiple of prefill_chunk"""
    decode_step_size: PositiveInt | None
    """tokens of history in each decode graph of llm_build2; null: its own choice"""
    post_weight_type: Literal["s8", "bf16", "fp8_e4m3", "fp8_e5m2"]
    """type of the output layer's weights"""
    post_topk: NonNegativeInt
    """candidates the output layer gives instead of all logits, for a runtime that reads them; 0: all logits"""
    npu_mode: Literal["NPU1", "NPU2", "NPU3"] | None
    """how many of the NPU's cores a graph is for; null: Pulsar2's own choice"""
    tensor_parallel_size: NonNegativeInt
    """PCIe cards that share each layer; 0: one"""
    check_level: Annotated[Literal[0, 1, 2], Unkeyed]
    """what Pulsar2 checks after the build: 0 that a layer runs, 1 a layer's values, 2 an answer to check_prompt"""
    check_prompt: Annotated[str | None, Unkeyed]
    """what check_level 2 asks the model; null: Pulsar2's own"""
    parallel: Annotated[PositiveInt, Unkeyed]
    """layers compiled at once; each takes host memory"""
    runtime: Literal["auto", "axllm", "main"]
    """what runs it on the board: axllm, the older main with a tokenizer server, or auto: axllm where it reads the tokenizer and template right"""
    model_type: str | None
    """model family to tell Pulsar2 (5.2 and newer) instead of config.json's, such as llama for a Llama-like model; null: config.json's"""
    tokenizer_type: str
    """chat and tokenizer type of the board's axllm, such as Qwen2_5; auto: by the model family"""
    toolchain: Annotated[Literal["auto", "local", "docker"], Unkeyed]
    """where Pulsar2 is: on PATH, in a Docker image, or auto: whichever is here"""
    image: Annotated[str | None, Unkeyed]
    """Docker image; null: the newest of the images called pulsar2 on this machine"""
    board: Annotated[Board, Unkeyed]
    """the device, for estimates"""

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if self.prompt_len % self.prefill_chunk:
            below = max(self.prompt_len // self.prefill_chunk, 1) * self.prefill_chunk
            raise ValueError(
                f"prompt_len {self.prompt_len} is not a multiple of prefill_chunk {self.prefill_chunk}; write target.prompt_len={below}"
            )
        if self.context_len <= self.prompt_len:
            raise ValueError(f"context_len {self.context_len} leaves no room for an answer after a prompt of prompt_len {self.prompt_len}")
        if lengths := self.last_kv_cache_len:
            if lengths != sorted(set(lengths)) or any(length % self.prefill_chunk for length in lengths):
                raise ValueError(f"last_kv_cache_len {lengths}: ascending multiples of prefill_chunk {self.prefill_chunk} are wanted")
            if lengths[-1] != self.prompt_len:
                raise ValueError(
                    f"last_kv_cache_len ends with {lengths[-1]}, the longest prompt, and prompt_len is {self.prompt_len}; "
                    f"write target.prompt_len={lengths[-1]}, with a target.context_len above it"
                )
        if self.check_prompt is not None and self.check_level != 2:
            raise ValueError("check_prompt is asked at check_level 2 only; write target.check_level=2")
        return self


class Mobilint(Target):
    kind: Literal["mobilint"]
    """a Mobilint NPU, through qbcompiler (0.11 and 0.12: qubee)"""
    chip: Literal["aries", "regulus"]
    """the NPU; language models for REGULUS take qbcompiler 1.3"""
    weight_type: Literal["w8", "w4v8", "w4"]
    """bits of the weights: 8, 4 with 8 for the value projection, or 4 (not with qbcompiler 1.3)"""
    context_len: PositiveInt
    """prompt and answer together in tokens, within the model's own limit"""
    languages: Annotated[list[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]], Field(min_length=1)] | None
    """calibrate on text in these languages, from `texts`; null: on the dataset's calib split through the training template"""
    texts: Annotated[str | None, Unkeyed]
    """folder with a file for each of `languages`: <language>.jsonl, a text a record, or <language>.txt, texts two blank lines apart"""
    samples: PositiveInt
    """calibration sequences in all, shared evenly by the languages"""
    min_tokens: Literal["auto"] | PositiveInt
    """shortest calibration sequence; shorter texts are left out, shorter conversations joined; auto: an eighth of context_len, at most 512"""
    max_tokens: Literal["auto"] | PositiveInt
    """longest calibration sequence; longer ones are cut, and counted; auto: half of context_len, at most 2048"""
    device: Annotated[Literal["auto", "gpu", "cpu"], Unkeyed]
    """where the compiler calibrates; auto: gpu where there is one"""
    sdk: Annotated[Literal["auto", "0.11", "0.12", "1.0", "1.1", "1.2", "1.3"], Unkeyed]
    """generation of the compiler's API; auto: by the version installed"""
    python: Annotated[str | None, Unkeyed]
    """Python interpreter that has the compiler; null: python3 on PATH"""
    image: Annotated[str | None, Unkeyed]
    """Docker image that has the compiler, used instead of an interpreter; null: none"""
    board: Annotated[Board, Unkeyed]
    """the device, for estimates"""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        low, high = self.lengths()
        if low > high:
            raise ValueError(f"min_tokens {low} is above max_tokens {high}")
        if high > self.context_len:
            raise ValueError(f"max_tokens {high} is above context_len {self.context_len}")
        if (self.languages is None) != (self.texts is None):
            raise ValueError("languages and texts go together: the languages, and the folder with a <language>.txt for each")
        if self.languages and len(set(self.languages)) != len(self.languages):
            raise ValueError("a language is named twice")
        if self.languages and self.samples < len(self.languages):
            raise ValueError(f"samples {self.samples} gives not one sequence to each of {len(self.languages)} languages")
        return self

    def lengths(self) -> tuple[int, int]:
        """(shortest, longest) calibration sequence in tokens. Mobilint's tutorial has 512 and 2,048 for a context of 4,096."""
        low = max(1, min(512, self.context_len // 8)) if self.min_tokens == "auto" else self.min_tokens
        high = max(1, min(2048, self.context_len // 2)) if self.max_tokens == "auto" else self.max_tokens
        return low, high


def _row_or_group(size: int) -> int:
    if size != -1 and size < 1:
        raise ValueError("input should be -1, for a whole row, or more than 0")
    return size


RowOrGroup = Annotated[int, AfterValidator(_row_or_group)]


class Openvino(Target):
    kind: Literal["openvino"]
    """Intel's NPU, GPU or CPU, through optimum-intel's exporter"""
    device: Literal["NPU", "CPU"]
    """device the bundle is made for"""
    weight_type: Literal["int8", "int4"]
    """weights: int8, or symmetric int4"""
    group_size: Literal["auto"] | RowOrGroup
    """int4 weights that share a scale; -1: a whole row; auto: 128 below a billion parameters, -1 above"""
    prompt_len: PositiveInt
    """longest prompt in tokens; an NPU is compiled for it"""
    context_len: PositiveInt
    """prompt and answer together in tokens"""
    environment: Annotated[str, Unkeyed]
    """Python environment of the exporter, made by scripts/openvino_env.sh"""
    board: Annotated[Board, Unkeyed]
    """the device, for estimates"""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        if self.context_len <= self.prompt_len:
            raise ValueError(f"context_len {self.context_len} leaves no room for an answer after a prompt of prompt_len {self.prompt_len}")
        if self.device == "NPU" and self.weight_type == "int4" and self.group_size not in ("auto", -1, 128):
            raise ValueError(f"group_size {self.group_size}: an NPU takes groups of 128 or whole rows (-1)")
        return self


class LlamaCpp(Target):
    context_len: PositiveInt
    """prompt and answer together in tokens, for run.sh and the Modelfile; the file itself has the model's own limit"""
    kv_cache: Annotated[Literal["f16", "q8_0"], Field(exclude_if=lambda kind: kind == "f16")]
    """type of keys and values in llama.cpp's cache, for run.sh and the proof; q8_0 takes about half of the memory. The file is the same"""
    environment: Annotated[str, Unkeyed]
    """Python environment with llama.cpp in it, made by scripts/gguf_env.sh"""


class Gguf(LlamaCpp):
    kind: Literal["gguf"]
    """a file for llama.cpp, Ollama and all else that reads GGUF, on any CPU or GPU"""
    weight_type: Literal[
        "f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0",
        "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q3_k_s", "q2_k",
    ]  # fmt: skip
    """type of the weights, as llama.cpp calls it; those with a k, and iq4_xs, take its own quantizer"""
    rows: NonNegativeInt
    """conversations of the calib split, at most, for the importance matrix that its quantizer weighs errors by; 0: none"""


class GgufLora(LlamaCpp):
    kind: Literal["gguf_lora"]
    """an adapter for a base that llama.cpp or Ollama has as a GGUF already"""
    weight_type: Literal["f32", "f16", "bf16"]
    """type of the adapter's matrices, as llama.cpp calls it"""


AnyTarget = Annotated[Llama2c | Axera | Mobilint | Openvino | Gguf | GgufLora, Field(discriminator="kind")]
