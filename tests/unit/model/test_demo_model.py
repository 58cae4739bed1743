"""The embedded base model: small, loadable, honest about how it was made, and its tokenizer gives back any text."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.data.tokenizer import DEMO_MODEL_FOLDER

EVERY_KIND = "".join(chr(code) for code in range(1, 0x110000, 37) if not 0xD800 <= code < 0xE000)


def test_the_demo_model_is_small_its_card_says_how_it_was_trained_and_its_tokenizer_takes_any_text():
    assert sum(file.stat().st_size for file in DEMO_MODEL_FOLDER.iterdir()) <= 4_000_000
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL_FOLDER)
    # 12 d^2 + 13 d a layer, 2 d at the end, and the two embeddings, with width d = 160
    expected = 5 * (12 * 160**2 + 13 * 160) + 2 * 160 + (2048 + 256) * 160
    assert sum(weight.numel() for weight in model.parameters()) == expected
    card = (DEMO_MODEL_FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("--seed", "validation loss", "license: mit", "tokens", "hardware"))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL_FOLDER)
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer("<|endoftext|>").input_ids == [tokenizer.eos_token_id] == [model.config.eos_token_id] == [0]
    for text in ("Hello  world\n\ttab ", "", EVERY_KIND):
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text
