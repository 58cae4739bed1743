"""The small GPT-2 that this project pretrained itself, `demo-base`."""

from pathlib import Path

DEMO_MODEL_FOLDER = Path(__file__).parent
