"""PUBLIC: the contract of models. A family's plugin runs it on a tiny checkpoint:

    @pytest.fixture(scope="module")
    def model(tmp_path_factory):
        folder = tiny_checkpoint("MyForConditionalGeneration", tmp_path_factory.mktemp("model"), ...)
        with ModelUnderTest(folder) as model:
            yield model

    @pytest.mark.parametrize("check", model_checks(), ids=str)
    def test_contract(check, model):
        check_model(check, model)

Nothing is recorded: every check holds two ways against each other that must come to the same, or two that
must not. Whether the family computes what it should is what `compare_with_transformers` says.
"""

from opsin.checkpoint.weights import LoadReport
from opsin.testing.models.inside import (
    build_unloaded,
    encode,
    fill,
    find_placeholders,
    input_context,
    loaded_model,
    process,
    recorded_logits,
    render,
    render_template,
    weight_report,
    weight_shapes,
)
from opsin.testing.models.outcome import CheckFailed, CheckOutcome
from opsin.testing.models.recorded import RecordedCase, recorded_cases
from opsin.testing.models.reference import Comparison, ModelCase, compare_with_transformers
from opsin.testing.models.subject import Answer, ModelUnderTest, make_images, make_videos
from opsin.testing.models.suite import ModelCheck, check_model, model_checks
from opsin.testing.models.tiny import own_checkpoint, randomise, tiny_checkpoint, tiny_tokenizer

__all__ = [
    "Answer",
    "CheckFailed",
    "CheckOutcome",
    "Comparison",
    "LoadReport",
    "ModelCase",
    "ModelCheck",
    "ModelUnderTest",
    "RecordedCase",
    "build_unloaded",
    "check_model",
    "compare_with_transformers",
    "encode",
    "fill",
    "find_placeholders",
    "input_context",
    "loaded_model",
    "make_images",
    "make_videos",
    "model_checks",
    "own_checkpoint",
    "process",
    "randomise",
    "recorded_cases",
    "recorded_logits",
    "render",
    "render_template",
    "tiny_checkpoint",
    "tiny_tokenizer",
    "weight_report",
    "weight_shapes",
]
