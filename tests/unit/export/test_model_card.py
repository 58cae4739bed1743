"""What a model card says of a run is data: no name and no text of the run becomes markup of the card."""

import re
from typing import Any

import pytest
import yaml
from helpers.fake_runs import make_metadata
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.export.folder import find_base, is_hub_id, public_name
from trainer.export.model_card import read_license, render_model_card
from trainer.export.verify import VerificationResult
from trainer.tracking.records import EventRecord

HOSTILE = "t<b>|`x``\x1b[2J\n# big\n[a](javascript:1)\udcff.jsonl"


@settings(max_examples=10, deadline=None)
@given(name=st.text(st.characters(codec=None), min_size=1, max_size=20).filter(lambda text: "/" not in text))
@example(name=HOSTILE)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_names_in_a_model_card_are_no_markup_and_its_front_matter_is_yaml(mode, name):
    metadata: dict[str, Any] = {**make_metadata(), "mode": mode, "not_comparable_with_card": [f"data: {name}"]}
    metadata["model"] = {**metadata["model"], "name": f"folder/{name}", "lora_targets": [name]}
    metadata["data"] = {**metadata["data"], "source": f"folder/{name}"}
    metadata["resolved"] = {**metadata["resolved"], "ds_config": name}
    events = [EventRecord(event="diagnosis", step=1, message=name, time=1.0)]
    text = render_model_card(metadata, events, VerificationResult(loss=1.0, summary=name), step=1, answer=name)
    assert text.replace("\n", "").replace("\N{NO-BREAK SPACE}", "").isprintable()
    assert len(text.split("\n---\n")) == 2
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == ("peft" if mode == "lora" else "transformers")
    body = re.sub(r"```python\n.+?```", "", text.split("---\n", 2)[2], flags=re.DOTALL)  # the example
    body = re.sub(r"(?<![`\\])(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", body)  # code spans, as CommonMark finds them
    assert not re.search(r"(?<!\\)[<>\[\]]", body)
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1


def test_the_model_card_names_a_base_of_the_hub_and_how_it_compares(tmp_path):
    metadata: dict[str, Any] = {**make_metadata(not_comparable_with_card=["data: another"]), "preset": "card"}
    metadata["model"] |= {"name": "openai-community/gpt2", "init": "pretrained"}
    metadata["data"]["source"] = f"org/name:part=0.5 {tmp_path}/secret=0.2 events.csv=0.3"
    text = render_model_card({**metadata, "mode": "lora"}, [], VerificationResult(loss=1.0), step=6, license="mit")
    assert "The card `gpt2-acled-t2s` (validation loss 1.2262, 1.0048, 0.9414 after its three epochs)" in text
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["base_model"], front["license"]) == ("openai-community/gpt2", "mit")
    assert (front["datasets"], front["metrics"]) == (["org/name"], ["perplexity"])
    assert str(tmp_path) not in text
    config = "generation_config=GenerationConfig.from_pretrained(folder)"
    assert f'base = AutoModelForCausalLM.from_pretrained("openai-community/gpt2", {config})' in text
    metadata["model"]["init"] = "random"
    assert "base_model" not in render_model_card(metadata, [], VerificationResult(), step=6)


def test_the_license_of_a_base_is_read_from_its_card_where_that_names_one(tmp_path):
    assert read_license(str(tmp_path)) is None
    for text, license in (("license: apache-2.0", "apache-2.0"), ("license: '<b>'", None), ("license: [", None)):
        (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
        assert read_license(str(tmp_path)) == license


def test_hub_names_and_paths_are_told_apart(tmp_path):
    assert all(map(is_hub_id, ("gpt2", "openai-community/gpt2")))
    assert not any(map(is_hub_id, ("demo-base", str(tmp_path), "./models/gpt2")))
    assert public_name("/data/secret/events.csv") == "events.csv"
    assert public_name("org/name") == "org/name"
    assert public_name("~nobody-here/secret/a b.csv=7 org/name=3") == "a b.csv=0.7 org/name=0.3"
    commit = "a" * 40
    for path, name, revision in (
        (f"/x/hub/models--org--some-name/snapshots/{commit}/", "org/some-name", commit),
        (f"/x/hub/models--gpt2/snapshots/{commit}", "gpt2", commit),
        ("/x/models/gpt2", "gpt2", None),
    ):
        model_info = {"name": path, "init": "pretrained"}
        assert find_base(model_info, tmp_path) == (path, name, revision)
        assert find_base(model_info, tmp_path, names_place=True) == (path, name if revision else path, revision)
