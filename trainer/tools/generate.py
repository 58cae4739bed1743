"""`launch/generate.py`: what the base and the runs on it make of the same prompts, side by side."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from trainer.config.errors import UserError
from trainer.config.files import read_text_file
from trainer.config.run_metadata import read_run_metadata
from trainer.config.schema import LoraSettings
from trainer.config.settings import Settings
from trainer.data.chat import ChatTemplate, end_token_ids
from trainer.data.conversations import Conversation, from_messages
from trainer.data.dataset import prepare
from trainer.data.templates import RecordError
from trainer.data.tokenizer import encode, load_tokenizer
from trainer.distributed.decoding import Sampling, decode
from trainer.export.export_cli import load_model_at_checkpoint, select_run_checkpoint
from trainer.model.build import TrainableModel, build_model, get_max_positions, load_config
from trainer.report.markdown import escape
from trainer.tracking.summary import show_plan
from trainer.training.generation import EvalPrompt, completion_length, make_prompts
from trainer.training.text_metrics import text_scores

BATCH_SIZE = 16  # prompts in one batch
LEAVE = ("", "exit", "quit")  # what ends the dialogue


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """What is to be completed, by which runs, and how: the flags of `launch/generate.py`."""

    runs: list[Path]
    prompt: list[str]
    prompts: Path | None  #: JSON lines of `prompt` or `messages`, with `reference` where there is one
    num: int  #: validation prompts that are taken where none are given
    checkpoint: str
    max_new_tokens: int | None  #: None: some more than the longest reference, or 64
    temperature: float  #: 0: greedy
    top_p: float
    seed: int
    text: bool  #: prompts as they are, although the runs were trained on conversations
    score: bool
    output: Path | None  #: the table as Markdown


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run folder with what was read of it."""

    folder: Path
    metadata: dict[str, Any]
    settings: Settings
    chat_template: str | None


def generate(request: GenerateRequest) -> int:
    """Complete the prompts by each model and show the texts; without prompts on a terminal: a dialogue. 0, or
    UserError."""
    runs = [_read_run(folder) for folder in request.runs]
    _check_one_tokenizer(runs)
    loaders = _list_models(runs, request.checkpoint)
    writer = _Writer(request, runs[0])
    if not request.prompt and request.prompts is None and sys.stdin.isatty() and sys.stdout.isatty():
        return _talk({label: load().causal for label, load in loaders.items()}, writer)
    prompts = writer.prompts()
    texts = {label: writer.complete(load().causal, prompts) for label, load in loaders.items()}
    for i, prompt in enumerate(prompts):
        show_plan([*_describe_prompt(prompt), *((label, completions[i]) for label, completions in texts.items())])
        print(flush=True)
    lines = [_describe_scores(label, completions, prompts) for label, completions in texts.items() if request.score]
    print("".join(f"{line}\n" for line in lines), end="", flush=True)
    if request.output is not None:
        request.output.write_text(_markdown(prompts, texts) + "".join(f"\n{line}\n" for line in lines), "utf-8")
    return 0


def _read_run(folder: Path) -> _Run:
    metadata = read_run_metadata(folder / "run.json")
    settings, chat_template = Settings.from_dict(metadata["settings"]), metadata["data"].get("chat_template")
    return _Run(folder=folder, metadata=metadata, settings=settings, chat_template=chat_template)


def _check_one_tokenizer(runs: Sequence[_Run]) -> None:
    """UserError where the runs cannot be given the same prompts."""
    first = runs[0]
    for run in runs:
        name = run.metadata["data"]["tokenizer"]
        if name is None:
            raise UserError(f"{run.folder}: trained on token ids; expected a run on text")
        if name != first.metadata["data"]["tokenizer"] or run.chat_template != first.chat_template:
            raise UserError(
                f"{run.folder}: another tokenizer or chat template than {first.folder}; expected runs with one"
            )


def _list_models(runs: Sequence[_Run], checkpoint_name: str) -> dict[str, Callable[[], TrainableModel]]:
    """{label: what loads it}: each base once, before the first run on it, then the run."""
    loaders: dict[str, Callable[[], TrainableModel]] = {}
    seen = set()
    names = [run.metadata["name"] for run in runs]
    for run, name in zip(runs, names, strict=True):
        base = run.metadata["model"]
        if base["fingerprint"] not in seen:
            seen.add(base["fingerprint"])
            loaders[f"base ({base['name'].rstrip('/').rsplit('/', 1)[-1]})"] = partial(_load_base, run)
        label = name if names.count(name) == 1 else str(run.folder)
        checkpoint = select_run_checkpoint(run.folder, checkpoint_name)
        loaders[label] = partial(load_model_at_checkpoint, run.folder, run.settings, checkpoint, run.metadata)
    return loaders


def _load_base(run: _Run) -> TrainableModel:
    """The model that the run began with, in float32; UserError where it is not there any more."""
    model_settings = dataclasses.replace(run.settings.model, quant=None, quant_double=False)
    settings = dataclasses.replace(run.settings, mode="full", lora=LoraSettings(), model=model_settings)
    model = build_model(settings)
    if model.metadata["fingerprint"] != run.metadata["model"]["fingerprint"]:
        raise UserError(f"{run.folder}: its base model is not as it was; put that one back")
    model.causal.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return model


class _Writer:
    """Prompts as token ids, and completions as text, for all models alike."""

    def __init__(self, request: GenerateRequest, run: _Run):
        self.request, self.run = request, run
        self.tokenizer = load_tokenizer(run.settings.model.model)
        self.max_positions = get_max_positions(load_config(run.settings.model))
        template = None if request.text else run.chat_template
        self.chat = None if template is None else ChatTemplate(self.tokenizer, template)
        self.end_token_ids = end_token_ids(self.tokenizer, self.chat.template if self.chat else None)
        self.sampling = None
        if request.temperature:
            self.sampling = Sampling(temperature=request.temperature, top_p=request.top_p, seed=request.seed)

    def prompts(self) -> list[EvalPrompt]:
        """Those given, or the first ones of the run's validation records; UserError where there are none."""
        request, settings = self.request, self.run.settings
        if request.prompt:
            return [self.prompt(text) for text in request.prompt]
        if request.prompts is not None:
            return list(self._read_file(request.prompts))
        data = prepare(settings.data, model=settings.model.model, global_batch=settings.train.global_batch)
        prompts = make_prompts(data, self.tokenizer, self.max_positions)[: request.num]
        if not prompts:
            raise UserError(f"{self.run.folder}: no validation record fits the model; pass --prompt TEXT")
        return prompts

    def prompt(self, text: str, references: tuple[str, ...] = ()) -> EvalPrompt:
        """What a user typed, as the first message of a conversation where the runs were trained on such."""
        return self._prompt(text, [{"role": "user", "content": text}], references)

    def _prompt(self, text: str, messages: list[dict[str, Any]], references: tuple[str, ...]) -> EvalPrompt:
        written = self.chat.prompt_text(Conversation(messages=messages)) if self.chat else text
        ids, *reference_ids = encode(self.tokenizer, [written, *references])
        room = 1 if self.max_positions is None else self.max_positions - len(ids)
        if not len(ids) or room < 1:
            raise UserError(
                f"--prompt: {len(ids)} tokens; expected from 1 to {(self.max_positions or len(ids) + 2) - 1}"
            )
        length = max(map(len, reference_ids), default=0)
        return EvalPrompt(text=text, ids=tuple(ids.tolist()), references=references, reference_length=length)

    def _read_file(self, path: Path) -> Iterator[EvalPrompt]:
        expected = "JSON lines with `prompt` or `messages`"
        lines = read_text_file(path, f"--prompts {path}", expected).splitlines()
        records = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not records:
            raise UserError(f"--prompts {path}: holds no line; expected {expected}")
        for number, line in records:
            try:
                yield self._parse(json.loads(line))
            except (ValueError, RecursionError, RecordError) as error:
                raise UserError(f"--prompts {path}, line {number}: {error}") from None

    def _parse(self, record: Any) -> EvalPrompt:
        """One line of a file; ValueError or RecordError where it is none."""
        references = record.get("reference", []) if isinstance(record, dict) else None
        references = [references] if isinstance(references, str) else references
        if not isinstance(references, list) or not all(isinstance(text, str) for text in references):
            raise ValueError("expected an object with `prompt` or `messages`, and `reference` as a text or several")
        if isinstance(record.get("prompt"), str):
            return self.prompt(record["prompt"], tuple(references))
        messages = record.get("messages")
        if self.chat is None or not isinstance(messages, list):
            raise ValueError("expected `prompt` as text" + (", or `messages`" if self.chat else ""))
        checked = from_messages({"messages": [*messages, {"role": "assistant", "content": "-"}]}).messages[:-1]
        if not checked:
            raise ValueError("expected at least one message")
        return self._prompt(str(checked[-1]["content"]), checked, tuple(references))

    def complete(self, causal: Any, prompts: Sequence[EvalPrompt]) -> list[str]:
        """One text for each prompt."""
        length = self.request.max_new_tokens
        if length is None:
            length = completion_length(prompts, None) if any(prompt.references for prompt in prompts) else 64
        if self.max_positions is not None:
            length = max(1, min(length, self.max_positions - max(len(prompt.ids) for prompt in prompts)))
        completions: list[list[int]] = []
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = [prompt.ids for prompt in prompts[start : start + BATCH_SIZE]]
            completions += decode(causal, batch, length, self.end_token_ids, sampling=self.sampling)
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in completions]


def _talk(models: Mapping[str, Any], writer: _Writer) -> int:
    """Answer one line after another by every model, until an empty one."""
    print("a prompt a line; an empty line ends", flush=True)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        if text.strip().lower() in LEAVE:
            return 0
        try:
            prompts = [writer.prompt(text)]
        except UserError as error:
            print(f"error: {error}", flush=True)
            continue
        show_plan([(label, writer.complete(causal, prompts)[0]) for label, causal in models.items()])


def _describe_prompt(prompt: EvalPrompt) -> list[tuple[str, str]]:
    count = len(prompt.references)
    names = ["reference"] if count == 1 else [f"reference {i + 1}" for i in range(count)]
    return [("prompt", prompt.text), *zip(names, prompt.references, strict=True)]


def _describe_scores(label: str, completions: Sequence[str], prompts: Sequence[EvalPrompt]) -> str:
    """One line of scores over the prompts that have references; UserError where none has."""
    pairs = [(text, prompt.references) for text, prompt in zip(completions, prompts, strict=True) if prompt.references]
    if not pairs:
        raise UserError("--score: no prompt has a reference; expected --prompts FILE with `reference`")
    scores = text_scores([text for text, _ in pairs], [references for _, references in pairs])
    return f"{label}: {', '.join(f'{name} {value:.3g}' for name, value in scores.items())} over {len(pairs)} prompts"


def _markdown(prompts: Sequence[EvalPrompt], texts: dict[str, list[str]]) -> str:
    """The table: a row for each prompt, a column for each model."""

    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(escape(" ".join(cell.split())) for cell in cells) + " |\n"

    head = ["prompt", "references", *texts]
    lines = [row(head), "|" + "---|" * len(head) + "\n"]
    for i, prompt in enumerate(prompts):
        references = " / ".join(prompt.references)
        lines.append(row([prompt.text, references, *(completions[i] for completions in texts.values())]))
    return "".join(lines)
