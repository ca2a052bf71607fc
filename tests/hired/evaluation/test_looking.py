"""Where a model looks, against transformers' own attention maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

import hired
from hired.budget import Budget
from hired.engine import EngineOptions
from hired.errors import ConfigurationError
from hired.evaluation import looking
from hired.types import Grid
from hired.vlm import VLM
from tests.pictures import picture
from tests.tiny import IMAGE_ID, tiny_llava_next

QUESTION = "What is there?"
SIZE = (60, 80)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llava_next(tmp_path_factory.mktemp("tiny"), pinpoints=[(2, 2)])


@pytest.fixture(scope="module")
def vlm(folder: Path) -> VLM:
    return hired.load(folder, device="cpu", engine=EngineOptions(kv_cache_bytes=2**22))


def test_the_language_models_attention_to_the_image_is_transformers(vlm: VLM, folder: Path) -> None:
    image = picture(*SIZE, noise=80)
    [tokens] = vlm.encode([vlm.partition(image)], budget=Budget(rate=1.0), policy="keep-all")
    ours = looking.attention_to_image(vlm, tokens, QUESTION)
    assert ours.sum() == pytest.approx(1)

    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="eager").eval()
    text = vlm.generator.prompts.render(QUESTION)
    inputs = processor(images=image, text=text, add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        maps = model(**inputs, output_attentions=True).attentions
    last = torch.stack(maps)[:, 0, :, -1].mean((0, 1))
    on_image = last[inputs.input_ids[0] == IMAGE_ID]
    without_newlines = on_image[vlm.generator.layout(tokens).source >= 0].double().numpy()
    # Features travel as float16.
    np.testing.assert_allclose(ours, without_newlines / without_newlines.sum(), rtol=0.02, atol=1e-4)


def test_an_engine_that_hides_its_model_is_a_configuration_error(folder: Path) -> None:
    other = hired.load(folder, device="cpu", engine=EngineOptions(name="transformers"))
    [tokens] = other.encode(
        [other.partition(picture(*SIZE, noise=80))], budget=Budget(rate=1.0), policy="keep-all"
    )
    with pytest.raises(ConfigurationError, match="does not show"):
        looking.attention_to_image(other, tokens, QUESTION)


@pytest.mark.parametrize(("share", "held"), [(0.25, 0.5), (0.5, 0.8), (1.0, 1.0), (0.01, 0.5)])
def test_the_top_tokens_hold_the_largest_parts(share: float, held: float) -> None:
    assert looking.share_of_top(np.array([0.1, 0.5, 0.1, 0.3]), share) == pytest.approx(held)


def test_the_most_attended_patches_are_counted_by_partition(vlm: VLM) -> None:
    images = [vlm.partition(picture(*SIZE, noise=80)), vlm.partition(picture(64, 64, noise=40))]
    layer = vlm.encoder.feature_layer
    expected = np.zeros(5)
    for image in images:
        [maps] = vlm.encoder.cls_attention([image], layers=[layer])
        [tokens] = vlm.encode([image], budget=Budget(rate=1.0), policy="keep-all")
        scores = maps[layer][tokens.partition, tokens.patch].numpy()
        for place in np.argsort(-scores)[: round(0.25 * len(tokens))]:
            expected[tokens.partition[place]] += 0.5
    found = looking.most_attended_by_partition(vlm.encoder, images, grid=Grid(2, 2), share=0.25)
    assert found is not None
    np.testing.assert_array_equal(found, expected)
    assert looking.most_attended_by_partition(vlm.encoder, images, grid=Grid(1, 2), share=0.25) is None


def test_there_is_a_map_of_the_full_image_for_every_layer_that_is_run(vlm: VLM) -> None:
    maps = looking.full_image_maps(vlm.encoder, vlm.partition(picture(*SIZE, noise=80)))
    side = vlm.encoder.tiling.patches_per_side
    assert [values.shape for values in maps] == [(side, side)] * (vlm.encoder.feature_layer + 1)
