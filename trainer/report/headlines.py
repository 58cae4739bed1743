"""The three numbers of a comparison, and line by line what they come from and depend on."""

from dataclasses import dataclass
from typing import Any

from trainer.report.formats import format_bytes, format_duration, format_interval, format_percent, join_words
from trainer.report.full_vs_lora import FullVsLora
from trainer.report.options import CostRatio

UNIT = "nats per token"


@dataclass(frozen=True, kw_only=True)
class Headline:
    """One of the three numbers of the first screen."""

    label: str
    value: str
    note: str


def build_headlines(pair: FullVsLora) -> tuple[Headline, ...]:
    """Loss, time and memory, each with its interval or the reason why there is none."""
    if pair.excess is None:
        loss = Headline(label="Loss", value="-", note="; ".join(pair.blockers) or "no interval: " + pair.no_losses)
    else:
        interval = f"[{pair.excess.low:+.4f}, {pair.excess.high:+.4f}]"
        note = f"{interval} {UNIT}{_bits_per_byte(pair)}, LoRA − full"
        loss = Headline(label="Loss", value=f"{pair.excess.estimate:+.4f}", note=note)
    return (
        loss,
        _cost_headline("Time", pair.time, format_duration),
        _cost_headline("Memory", pair.memory, format_bytes),
    )


def _bits_per_byte(pair: FullVsLora) -> str:
    """` = +0.0100 bits per byte` of the excess, "" where the bytes of the records are not known."""
    bits = pair.losses.to_bits_per_byte(pair.excess.estimate) if pair.losses and pair.excess else None
    return "" if bits is None else f" = {bits:+.4f} bits per byte"


def _cost_headline(label: str, cost: CostRatio, format_value: Any) -> Headline:
    values = f"{format_value(cost.lora)} against {format_value(cost.full)}"
    if cost.is_of_a_step and cost.lora is not None and cost.full is not None:
        values = f"{cost.lora:.3g} s a step against {cost.full:.3g} s, in alternation"
    if cost.ratio is not None:
        return Headline(label=label, value=f"{cost.ratio:.2f}x", note=values)
    known = f" ({values})" if cost.lora is not None and cost.full is not None else ""
    return Headline(label=label, value="-", note=f"not compared: {cost.reason}{known}")


def describe_numbers(pair: FullVsLora) -> list[str]:
    """The losses behind a comparison, what cannot be had, and what the costs depend on."""
    names = f"{pair.lora.label_with_lr} against {pair.full.label_with_lr}"
    if pair.blockers:
        return [f"{names}: not ranked ({'; '.join(pair.blockers)})."]
    line = f"{names}: {pair.answer}; loss {pair.lora_loss:.4f} against {pair.full_loss:.4f}"
    line += f", {UNIT}" if pair.excess is None else f", difference {format_interval(pair.excess)} {UNIT}"
    line += _bits_per_byte(pair)
    if pair.contrast is not None:
        line += f"; beyond the margin of {describe_margin(pair)}: at most {pair.contrast.upper:+.4f} "
        line += f"(one-sided {100 * pair.contrast.level:.3g} %)"
    elif pair.excess is not None:
        reason = pair.margin.why_not(pair.losses) if pair.losses else "that needs the losses of single records"
        line += f"; whether it is within the margin is not known: {reason}"
    lines = [line + "."]
    if pair.losses and pair.losses.num_in_train:
        lines.append(f"{names}: {pair.losses.num_in_train:,} records that equal a training record are left out.")
    if pair.losses and pair.losses.are_blocks and (column := pair.full.runs[0].get("data.split_by")):
        lines.append(
            f"{names}: records of one {column} may stand in several blocks, which the interval takes for independent; "
            "it may be too narrow, and --objective completion keeps records apart."
        )
    if pair.no_losses:
        lines.append(f"{names}: {pair.no_losses}; an interval over seeds alone holds for this validation set only.")
    return lines


def describe_costs(pair: FullVsLora) -> list[str]:
    """`LoRA against full: 0.95% of its trainable parameters, 0.43x its memory; time not compared (other hardware).`

    And what time and memory depend on and was not the same.
    """
    parts = [f"{format_percent(pair.parameters)} of its trainable parameters"]
    withheld: dict[str, list[str]] = {}
    for name, cost in (("time", pair.time), ("memory", pair.memory)):
        if cost.ratio is None:
            withheld.setdefault(cost.reason, []).append(name)
        else:
            parts.append(f"{cost.ratio:.2f}x its {name}")
    text = join_words(parts) + "".join(f"; {join_words(names)} not compared ({why})" for why, names in withheld.items())
    return [f"{pair.lora.label_with_lr} against {pair.full.label_with_lr}: {text}.", *_cost_notes(pair)]


def _cost_notes(pair: FullVsLora) -> list[str]:
    if pair.time.ratio is None and pair.memory.ratio is None:
        return []
    a, b = pair.lora.finished_runs[0], pair.full.finished_runs[0]
    paths = {
        "micro-batch": "resolved.micro_batch",
        "precision": "resolved.precision",
        "ZeRO file": "resolved.ds_config",
        "block length": "data.block_size",
        "threads per rank": "resolved.threads_per_rank",
    }
    differences = [
        f"{name} {a.get(path)} against {b.get(path)}" for name, path in paths.items() if a.get(path) != b.get(path)
    ]
    labels = f"{pair.lora.label} and {pair.full.label}"
    text = f"Time and memory of {labels} were measured with different settings: {', '.join(differences)}."
    return [text] if differences else []


def describe_margin(pair: FullVsLora) -> str:
    """The margin, with what it comes to where the gain is known."""
    if pair.losses is None or pair.losses.base is None:
        return pair.margin.describe()
    return pair.margin.describe(pair.losses.mean_loss(pair.losses.base - pair.losses.full))
