from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from hired.errors import ModelError
from hired.tower import Tower, _through
from tests.towers import tiny_tower

NUM_PARTITIONS, PATCHES = 3, 16


@pytest.fixture(scope="module")
def module() -> CLIPVisionModel:
    return tiny_tower()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(NUM_PARTITIONS, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_features_equal_the_hidden_state_above_the_layer(
    module: CLIPVisionModel, pixels: torch.Tensor, layer: int
) -> None:
    hidden_states = module(pixels, output_hidden_states=True).hidden_states
    features = Tower(module).look(pixels, layer).features()
    torch.testing.assert_close(features, hidden_states[layer + 1][:, 1:], atol=0, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_any_activation_equals_transformers_own(activation: str, pixels: torch.Tensor) -> None:
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        hidden_act=activation,
        initializer_factor=4.0,
    )
    module = CLIPVisionModel(config).eval()
    expected = module(pixels, output_hidden_states=True).hidden_states[2][:, 1:]
    torch.testing.assert_close(Tower(module).look(pixels, 1).features(), expected, atol=0, rtol=0)


@torch.no_grad()
def test_compiled_layers_see_the_same_and_are_compiled_once_for_each_size(
    module: CLIPVisionModel, pixels: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    counter = CompileCounter()  # runs what was traced as it is: no compiler of C++ is needed
    compiled = torch.compile(_through, dynamic=False, backend=counter)
    monkeypatch.setattr("hired.tower._compiled", lambda: compiled)
    tower = Tower(module)
    for batch in (pixels, pixels[:2], pixels):
        expected = tower.look(batch, 3, read_layers=[1])
        sight = tower.look(batch, 3, read_layers=[1], compiled=True)
        torch.testing.assert_close(sight.features(), expected.features(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sight.from_cls[1], expected.from_cls[1], atol=1e-6, rtol=1e-5)
    assert counter.frame_count == 2


@torch.no_grad()
def test_features_of_some_patches_equal_those_of_all(module: CLIPVisionModel, pixels: torch.Tensor) -> None:
    sight = Tower(module).look(pixels, 2)
    partition, patch = torch.tensor([0, 0, 2, 1]), torch.tensor([3, 15, 0, 7])
    torch.testing.assert_close(
        sight.features_at(partition, patch), sight.features()[partition, patch], atol=1e-6, rtol=1e-5
    )


@torch.no_grad()
def test_what_cls_attends_to_equals_the_eager_attention_maps(
    module: CLIPVisionModel, pixels: torch.Tensor
) -> None:
    sight = Tower(module).look(pixels, 3, read_layers=range(4))
    eager = tiny_tower()
    eager.set_attn_implementation("eager")
    maps = eager(pixels, output_attentions=True).attentions
    for layer in range(4):
        expected = maps[layer][:, :, 0, 1:]
        torch.testing.assert_close(sight.from_cls[layer], expected.sum(1), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(sight.from_cls_by_head[layer], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_keys_are_those_of_the_last_layer(module: CLIPVisionModel, pixels: torch.Tensor) -> None:
    below = module(pixels, output_hidden_states=True).hidden_states[2]
    layer = module.encoder.layers[2]
    expected = layer.self_attn.k_proj(layer.layer_norm1(below))[:, 1:]
    torch.testing.assert_close(Tower(module).look(pixels, 2).keys(), expected)


@torch.no_grad()
def test_layers_above_may_be_missing(pixels: torch.Tensor) -> None:
    whole, cut = tiny_tower(), tiny_tower()
    del cut.encoder.layers[3]
    assert Tower(cut).layer_of(-2) == Tower(whole).layer_of(-2) == 2
    assert Tower(cut).look(pixels, 2).features().equal(Tower(whole).look(pixels, 2).features())
    with pytest.raises(ModelError, match="none of 3 layers"):
        Tower(cut).layer_of(-1)


@pytest.mark.parametrize(("hidden_state", "layer"), [(-1, 3), (-2, 2), (-4, 0), (1, 0), (4, 3)])
def test_hidden_states_are_counted_from_either_end(
    module: CLIPVisionModel, hidden_state: int, layer: int
) -> None:
    assert Tower(module).layer_of(hidden_state) == layer


@pytest.mark.parametrize("hidden_state", [0, 5, -5])
def test_hidden_states_that_no_layer_puts_out_are_refused(module: CLIPVisionModel, hidden_state: int) -> None:
    with pytest.raises(ModelError, match="output of none"):
        Tower(module).layer_of(hidden_state)


def test_several_feature_layers_are_refused(module: CLIPVisionModel) -> None:
    with pytest.raises(ModelError, match="several layers"):
        Tower(module).layer_of([-2, -3])  # type: ignore[arg-type]


def test_a_tower_without_a_cls_token_is_refused() -> None:
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=16,
        patch_size=8,
    )
    with pytest.raises(ModelError, match="SiglipVisionModel is no CLIP vision tower"):
        Tower(SiglipVisionModel(config))
