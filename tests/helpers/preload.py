"""What the server has behind it that ranks are forked from: imports, and what transformers computes once a process."""

import importlib

MODULES = [
    "trainer.run",
    "trainer.export.export_cli",
    "deepspeed.module_inject.auto_ep",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "peft.utils.transformers_weight_conversion",
    "pyarrow.dataset",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.conversion_mapping",
    "wandb",
    "pytest",
    "helpers.engines",
    "helpers.launch_ranks",
    "helpers.process_groups",
]
for name in MODULES:
    importlib.import_module(name)
importlib.import_module("trainer.config.cli").parse_args(["--mode", "full", "--preset", "demo"])  # reads tables
importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("gpt2")
