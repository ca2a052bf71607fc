"""Generation by vLLM, where it is installed: the interface of the other engines over vLLM's own.

Whole prompts go in as embeddings. Two things differ from the other engines. Positions cannot have gaps, as
vLLM counts them itself. And vLLM serves the language model alone, which a multimodal checkpoint does not hold
in a form that it reads, so that half is written out once (``language_model_folder``).

vLLM decides when an answer ends so that it computes nothing in vain, and ``Answer`` decides again, so that
every engine ends answers by the same rules.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hired.engine import Completion, EngineOptions, Event, Outcome, Request, answers_in_order
from hired.engine.answer import Answer
from hired.engine.stepped import streamed
from hired.errors import ConfigurationError, GenerationError

# What the engine stands on: other values would give wrong answers or none.
_FIXED = {"enable_prompt_embeds": True, "enable_prefix_caching": False}
_RESERVED = ("model", "tokenizer", "skip_tokenizer_init", *_FIXED)

# Prompts that wait for their first token: enough for any prefill pass, few enough for the host's memory
# (a prompt of LLaVA-NeXT-7B with all its tokens is 24 MB).
_MAX_UNSEEN = 64


class VllmEngine:
    """Continues prompts with the language model in ``folder``, whose tokenizer lies beside it.

    ``eos_token_ids`` end an answer; ``decode`` turns ids into the text in which stop strings are sought.
    Not for use from several threads at once. Raises ConfigurationError when vLLM is not installed, or does
    not start with these options. An error of vLLM that is not one prompt's is raised as it comes: its engine
    is then dead.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        eos_token_ids: Collection[int],
        decode: Callable[[Sequence[int]], str],
        options: EngineOptions | None = None,
    ) -> None:
        arguments = _arguments(folder, dtype, options or EngineOptions("vllm"))
        self._vllm = _installed()
        self._llm = _started(self._vllm, arguments)
        self._engine = self._llm.llm_engine
        self._max_positions: int = self._engine.model_config.max_model_len
        self._max_running: int = self._engine.vllm_config.scheduler_config.max_num_seqs
        self._dtype = dtype
        self._eos_token_ids = frozenset(eos_token_ids)
        self._decode = decode
        self._running: dict[int, Answer] = {}
        self._refused: list[Event] = []
        self._num_submitted = 0

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do or to tell."""
        return bool(self._running or self._refused)

    @property
    def has_room(self) -> bool:
        """Whether another request could join soon; vLLM itself would queue any number of them."""
        num_unseen = sum(not answer.token_ids for answer in self._running.values())
        return len(self._running) < self._max_running and num_unseen < _MAX_UNSEEN

    def generate(self, requests: Iterable[Request]) -> list[Outcome]:
        """One answer a request, in order. Requests are taken as there is room for them."""
        return answers_in_order(self.stream(requests))

    def stream(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Events as they come. Closing the iterator cancels what it has not told yet."""
        return streamed(self, requests)

    def submit(self, request: Request) -> int:
        """A handle for the request, whose events come from ``step``; the first may be its refusal.

        Raises ConfigurationError for positions with gaps.
        """
        _check_positions(request.positions)
        handle = self._num_submitted
        self._num_submitted += 1
        try:
            request.check_fits(self._max_positions)
            prompt = {"prompt_embeds": self._on_host(request.embeddings)}
            self._engine.add_request(str(handle), prompt, self._sampling_params(request))
        except GenerationError as error:
            self._refused.append(Event(handle, outcome=error))
        except ValueError as error:
            refusal = GenerationError(f"vLLM refuses the prompt: {error}")
            refusal.__cause__ = error
            self._refused.append(Event(handle, outcome=refusal))
        else:
            self._running[handle] = Answer(request, self._eos_token_ids, self._decode)
        return handle

    def cancel(self, handle: int) -> None:
        """Forget a request; nothing is told about it any more. Unknown and ended ones are ignored."""
        self._refused = [event for event in self._refused if event.index != handle]
        if self._running.pop(handle, None) is not None:
            self._engine.abort_request([str(handle)])

    def step(self) -> list[Event]:
        """One step of vLLM, and what it brought."""
        events, self._refused = self._refused, []
        if self._running:
            for output in self._engine.step():
                events += self._events(output)
        return events

    def _events(self, output: Any) -> Iterator[Event]:
        """What a ``RequestOutput`` with the new tokens of one request comes to."""
        handle = int(output.request_id)
        answer = self._running.get(handle)
        if answer is None:  # cancelled while it was computed
            return
        part = output.outputs[0]
        for token_id in part.token_ids:
            taken = answer.take(token_id)
            yield Event(handle, taken, answer.outcome)
            if answer.outcome is not None:
                break
        if output.finished:
            del self._running[handle]
            if answer.outcome is None:
                yield Event(handle, outcome=_ended(answer, part.finish_reason))
        elif answer.outcome is not None:
            self.cancel(handle)

    def _on_host(self, embeddings: Tensor) -> Tensor:
        """The embeddings in the engine's precision, where vLLM wants them.

        Raises GenerationError for values that are not numbers: vLLM would answer with fluent nonsense.
        """
        embeddings = embeddings.to("cpu", self._dtype)
        if not embeddings.isfinite().all():
            raise GenerationError(
                "the prompt's embeddings are not numbers; run the model in bfloat16 or float32"
            )
        return embeddings

    def _sampling_params(self, request: Request) -> Any:
        sampling = request.sampling
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=None if sampling.is_greedy else sampling.seed,
            max_tokens=request.max_new_tokens,
            stop=list(request.stop) or None,
            include_stop_str_in_output=True,
            detokenize=bool(request.stop),
            stop_token_ids=sorted(self._eos_token_ids),
            ignore_eos=True,  # the ids above are all there are, whatever lies beside the weights
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )


def _installed() -> Any:
    try:
        vllm = importlib.import_module("vllm")
        importlib.import_module("vllm.sampling_params")
    except ImportError as error:
        raise ConfigurationError(
            "the engine 'vllm' needs vLLM: pip install hired[vllm], or choose another engine"
        ) from error
    return vllm


def _arguments(folder: Path, dtype: torch.dtype, options: EngineOptions) -> dict[str, Any]:
    """What ``vllm.LLM`` is called with: ours, where the caller gives nothing else."""
    if taken := sorted(set(_RESERVED) & set(options.vllm)):
        raise ConfigurationError(f"engine vllm: {', '.join(taken)} cannot be chosen; leave it out")
    if options.quantisation != "none":
        raise ConfigurationError(
            f"quantisation {options.quantisation} is not for the engine 'vllm': name a method of vLLM's own, "
            "vllm={'quantization': 'fp8'}"
        )
    ours = {
        "dtype": str(dtype).removeprefix("torch."),
        "gpu_memory_utilization": options.memory_fraction,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "max_num_seqs": options.max_sequences,
        "max_num_batched_tokens": options.prefill_tokens,
    }
    given = {name: value for name, value in ours.items() if value is not None}
    return {**given, **options.vllm, **_FIXED, "model": str(folder)}


def _started(vllm: Any, arguments: dict[str, Any]) -> Any:
    try:
        return vllm.LLM(**arguments)
    except (TypeError, ValueError, RuntimeError, OSError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in sorted(arguments.items()))
        raise ConfigurationError(f"vLLM does not start with {given}: {error}") from error


def _check_positions(positions: Tensor) -> None:
    if not torch.equal(positions, torch.arange(len(positions), device=positions.device)):
        raise ConfigurationError(
            "the engine 'vllm' counts positions itself and cannot leave gaps where tokens were dropped: "
            "set positions=compact, or choose another engine"
        )


def _ended(answer: Answer, finish_reason: str | None) -> Outcome:
    """The outcome of an answer that vLLM alone held to be complete."""
    token_ids = tuple(answer.token_ids)
    if finish_reason == "stop":
        return Completion(token_ids, "stop")
    if finish_reason == "length":
        return Completion(token_ids, "length")
    return GenerationError(f"vLLM gave the answer up after {len(token_ids)} tokens ({finish_reason})")


def language_model_folder(
    source: Path, dtype: torch.dtype, write: Callable[[Path], None], *, cache: Path | None = None
) -> Path:
    """The folder with the language model of the checkpoint in ``source``, for ``vllm.LLM``.

    ``write`` is given an empty folder to put it into (``write_language_model`` does), once for each state of
    the checkpoint's files: later calls find it in ``cache``, by default ``hired`` in the user's cache
    folder. Processes that write at once do not disturb each other; one that dies leaves nothing in the way.
    """
    cache = cache or _user_cache() / "hired" / "language_models"
    folder = cache / f"{source.resolve().name}-{_fingerprint(source, dtype)}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unfinished-") as unfinished:
            written = Path(unfinished) / "language_model"
            written.mkdir()
            write(written)
            _move(written, folder)
    except OSError as error:
        raise ConfigurationError(
            f"the language model of {source} cannot be written to {cache} ({error}): make room there, or set "
            "XDG_CACHE_HOME to a folder that has it"
        ) from error
    return folder


def _move(written: Path, folder: Path) -> None:
    try:
        written.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster with the same
            raise


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def _fingerprint(source: Path, dtype: torch.dtype) -> str:
    """Changes with the precision and the checkpoint's files, told by size and time: they are big."""
    files = [
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for pattern in ("*.json", "*.safetensors", "*.model")
        for path in sorted(source.glob(pattern))
    ]
    state = json.dumps([str(source.resolve()), files, str(dtype)])
    return hashlib.sha256(state.encode()).hexdigest()[:16]


def write_language_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The language model inside ``model`` as a checkpoint of its own, with the tokenizer beside it.

    ``model`` is one of transformers' that hold their parts as ``model.language_model`` and ``lm_head``. No
    weight is copied on the way.
    """
    from transformers import AutoModelForCausalLM

    weights = {
        f"model.{name}": weight for name, weight in model.model.language_model.state_dict().items()
    } | {f"lm_head.{name}": weight for name, weight in model.lm_head.state_dict().items()}
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(model.config.get_text_config(), dtype=model.dtype)
    alone.load_state_dict(weights, assign=True)
    alone.tie_weights()
    alone.generation_config = model.generation_config
    alone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
