"""Names of configurations' values are known without importing every configuration."""

from __future__ import annotations

import sys
from subprocess import run

import pytest
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from offmoe.hf.load.config_names import in_any_config

NAMES = ("num_experts_per_tok", "n_embd", "mamba_d_state", "use_cache", "device_memorry", "profil", "experts")


class Elsewhere(PreTrainedConfig):
    model_type = "offmoe-test-elsewhere"
    value_of_elsewhere = 1


def test_values_of_registered_configurations_count() -> None:
    assert not in_any_config("value_of_elsewhere")
    AutoConfig.register(Elsewhere.model_type, Elsewhere)
    try:
        assert in_any_config("value_of_elsewhere")
    finally:
        CONFIG_MAPPING._extra_content.pop(Elsewhere.model_type)


@pytest.mark.slow
def test_the_answer_is_that_of_asking_every_configuration() -> None:
    configs = [CONFIG_MAPPING[model_type] for model_type in CONFIG_MAPPING]
    for name in NAMES:
        asked = (hasattr(c, name) or name in c.attribute_map or name in c.__dataclass_fields__ for c in configs)
        assert in_any_config(name) == any(asked), name


@pytest.mark.slow
def test_a_misspelt_name_imports_no_model() -> None:
    script = (
        "import sys\nfrom offmoe.hf.load.config_names import in_any_config\n"
        "assert not in_any_config('slots_per_layerr')\n"
        "print(sum('.configuration_' in name for name in sys.modules))"
    )
    done = run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20
