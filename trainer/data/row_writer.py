"""Examples -> rows on disk: tokenised in batches, packed by the objective, with what does not fit counted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config.choices import MAX_NUM_SAMPLES, Objective, UnusableRecords
from trainer.config.errors import UserError
from trainer.data import tokenizer
from trainer.data.chat import ChatTemplate, MaskError
from trainer.data.examples import DataInput, Example, content_of
from trainer.data.packing import Packer
from trainer.data.row_info import RowInfo, block_ids, count_target_bytes, hash_text
from trainer.data.show import mark_targets
from trainer.data.token_dataset import SPLITS, TokenIds, load_token_dataset

MAX_SAMPLE_CHARACTERS = 4000  # length of a validation pair that is kept for samples
MAX_REFERENCES = 16  # of one prompt that are kept
#: What makes no whole row, and what is said of it.
PROBLEMS = {
    "too long": "records are longer than --block-size {} tokens and are left out",
    "cut": "conversations are cut at --block-size {} tokens",
    "tools": "conversations have tools, which the chat template does not write",
    "unusable": "conversations cannot be learnt from and are left out",
}


@dataclass(kw_only=True)
class RowWriter:
    """Writes the rows of all splits into a folder; `problems` counts per (split, kind) what makes no whole row."""

    folder: Path
    objective: Objective
    block_size: int
    tokenizer: Any
    chat: ChatTemplate | None  #: for conversations, None where records are text or ids
    dtype: str
    shared_hashes: set[int]  #: of records of val and test that equal a training record
    val_texts: list[tuple[str, str]] = field(default_factory=list)
    num_references: dict[str, int] = field(default_factory=dict)  #: kept of each prompt in `val_texts`
    example: str = ""  #: the first training row, with what is learnt of it marked
    problems: Counter[tuple[str, str]] = field(default_factory=Counter)
    first_problems: dict[tuple[str, str], str] = field(default_factory=dict)
    rows: dict[str, list[tuple[str, str | None, bool]]] = field(default_factory=lambda: {"val": [], "test": []})

    def __post_init__(self) -> None:
        self.packers = {
            split: Packer(
                self.folder,
                split,
                objective=self._objective(split),
                block_size=self.block_size,
                dtype=self.dtype,
                has_mask=self._has_mask(split),
            )
            for split in SPLITS
        }

    def write(self, data_input: DataInput, batch: Sequence[Example], splits: Sequence[str]) -> None:
        """Append a batch of examples, each to its split."""
        if data_input.source.split == "retain":
            self._write_blocks(batch, splits)
        elif self.chat is not None:
            self._write_conversations(data_input, batch, splits)
        elif self.objective == "completion":
            self._write_rows(data_input, batch, splits)
        else:
            self._write_blocks(batch, splits)

    def _write_blocks(self, batch: Sequence[Example], splits: Sequence[str]) -> None:
        """All texts joined, each with its end; ids that came as ids have it already."""
        if any(example.ids is not None for example in batch):
            texts = [np.asarray(example.ids, dtype=np.uint32) for example in batch]
        else:
            encoded = tokenizer.encode(self.tokenizer, [example.prompt + example.completion for example in batch])
            texts = [np.concatenate([ids, self._eos()]) for ids in encoded]
        for split, packer in self.packers.items():
            if split_ids := [ids for ids, example_split in zip(texts, splits, strict=True) if example_split == split]:
                packer.add_texts(split_ids)
                self._keep_example(split, split_ids[0], np.arange(len(split_ids[0])) > 0)
        for example, split in zip(batch, splits, strict=True):
            if example.ids is None:
                self._keep_val_text(split, example.prompt, example.completion)

    def _write_rows(self, data_input: DataInput, batch: Sequence[Example], splits: Sequence[str]) -> None:
        """One record a row; prompt and completion are encoded apart, so that the boundary is exact."""
        prompts = tokenizer.encode(self.tokenizer, [example.prompt for example in batch])
        completions = tokenizer.encode(self.tokenizer, [example.completion for example in batch])
        for example, split, prompt_ids, completion_ids in zip(batch, splits, prompts, completions, strict=True):
            ids = np.concatenate([prompt_ids, completion_ids, self._eos()])
            self._keep_val_text(split, example.prompt, example.completion)
            if self.packers[split].add_row(ids, len(prompt_ids)):
                self._keep_example(split, ids, np.arange(len(ids)) >= len(prompt_ids))
                self._keep_row_info(split, example)
            else:
                self._add_problem(split, "too long", f"{data_input.locate(example)}, {len(ids)} tokens")

    def _write_conversations(self, data_input: DataInput, batch: Sequence[Example], splits: Sequence[str]) -> None:
        """One conversation a row, cut at the block size; what cannot be learnt from is counted."""
        for example, split in zip(batch, splits, strict=True):
            assert self.chat is not None
            assert example.conversation is not None
            try:
                row = self.chat.encode(example.conversation)
                ids, is_target = row.ids[: self.block_size], row.is_target[: self.block_size]
                if not is_target[1:].any():
                    raise MaskError(
                        f"its assistant turns lie beyond --block-size {self.block_size} ({len(row.ids)} tokens)"
                    )
            except MaskError as error:
                self._add_problem(split, "unusable", f"{data_input.locate(example)}: {error}")
                continue
            if example.conversation.tools and "tools" not in self.chat.template:
                self._add_problem(split, "tools", data_input.locate(example))
            if len(row.ids) > self.block_size:
                self._add_problem(split, "cut", f"{data_input.locate(example)}, {len(row.ids)} tokens")
            self.packers[split].add_masked_row(ids, is_target)
            self._keep_val_text(split, row.prompt, row.completion)
            self._keep_example(split, ids, is_target)
            self._keep_row_info(split, example)

    def _objective(self, split: str) -> Objective:
        return "blocks" if split == "retain" else self.objective

    def _has_mask(self, split: str) -> bool:
        return self.chat is not None and split != "retain"

    def _eos(self) -> TokenIds:
        return np.asarray([self.tokenizer.eos_token_id], dtype=np.uint32)

    def _keep_val_text(self, split: str, prompt: str, completion: str) -> None:
        """The first validation prompts, each with all that follows it: several references of one prompt."""
        if split != "val" or len(prompt) + len(completion) > MAX_SAMPLE_CHARACTERS:
            return
        num_references = self.num_references.get(prompt, 0) if prompt else 0
        num_prompts = len(self.val_texts) - sum(self.num_references.values()) + len(self.num_references)
        if num_references < MAX_REFERENCES if num_references else num_prompts < MAX_NUM_SAMPLES:
            self.val_texts.append((prompt, completion))
            if prompt:
                self.num_references[prompt] = num_references + 1

    def _keep_example(self, split: str, ids: TokenIds, is_target: NDArray[np.bool_]) -> None:
        if split == "train" and not self.example and self.tokenizer is not None:
            self.example = mark_targets(self.tokenizer, ids, is_target)

    def _keep_row_info(self, split: str, example: Example) -> None:
        if split in self.rows:
            row_id = hash_text(content_of(example))
            group = None if example.group is None else hash_text(example.group)
            self.rows[split].append((row_id, group, int(row_id, 16) in self.shared_hashes))

    def _add_problem(self, split: str, kind: str, where: str) -> None:
        self.problems[split, kind] += 1
        self.first_problems.setdefault((split, kind), where)

    def row_info(self, split: str) -> RowInfo:
        """Who the rows of a split are, read back from what was just written."""
        datasets = {
            name: load_token_dataset(
                self.folder,
                name,
                dtype=self.dtype,
                num_rows=self.packers[name].num_examples,
                num_tokens=self.packers[name].num_tokens,
                has_mask=self._has_mask(name),
            )
            for name in (split, "train")
        }
        rows = self.rows.get(split, [])
        if self._objective(split) == "blocks":
            is_like_train = self.objective == "blocks" and len(datasets[split])
            train_ids = set(block_ids(datasets["train"])) if is_like_train else set()
            rows = [(row_id, None, row_id in train_ids) for row_id in block_ids(datasets[split])]
        return RowInfo(
            ids=[row_id for row_id, _, _ in rows],
            groups=[group for _, group, _ in rows],
            targets=datasets[split].num_target_tokens().tolist(),
            num_bytes=count_target_bytes(datasets[split], self.tokenizer),
            in_train=[shared for _, _, shared in rows],
        )

    def notices(self, unusable_records: UnusableRecords) -> list[str]:
        """One line for everything that was left out or cut; UserError where that is refused, or nothing is left."""
        lines = []
        for split, packer in self.packers.items():
            num_records = packer.num_records + self.problems[split, "unusable"]
            if self._objective(split) == "blocks" and packer.num_dropped:
                lines.append(f"{split}: the last {packer.num_dropped} tokens do not fill a block and are left out")
            for kind, text in PROBLEMS.items():
                if number := self.problems[split, kind]:
                    first = f"(first: {self.first_problems[split, kind]})"
                    lines.append(f"{split}: {number} of {num_records} {text.format(self.block_size)} {first}")
                if kind == "too long" and 0 < number == num_records:
                    raise UserError(
                        f"--block-size {self.block_size}: all {num_records} {split} records are longer (first: "
                        f"{self.first_problems[split, kind]}); raise --block-size"
                    )
            num_unusable = self.problems[split, "unusable"]
            if num_unusable and (unusable_records == "refuse" or num_unusable == num_records):
                is_some = num_unusable < num_records
                remedy = "leave them out with --unusable-records drop" if is_some else "pass another --chat-template"
                raise UserError(f"{lines[-1].replace(' and are left out', '')}; mend them, or {remedy}")
        return lines
