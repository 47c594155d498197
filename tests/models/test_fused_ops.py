"""Operations with a derivative of their own against torch's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

from poise.models.fused_ops import AdaptedLinear, AdaptedMap, ChosenLogprob


def test_chosen_logprob_is_log_softmax_with_its_gradient() -> None:
    torch.manual_seed(0)
    weight, chosen = torch.randn(50, 8, dtype=torch.float64), torch.randint(50, (300,))  # rows: two blocks and a part
    ours = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    naive = ours.detach().clone().requires_grad_()
    value = ChosenLogprob.apply(ours, weight, chosen)
    expected = (naive @ weight.T).log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    torch.testing.assert_close(value.double(), expected, rtol=0, atol=2e-6)  # kept in float32
    outer = torch.randn(300, dtype=torch.float64)
    (value * outer).sum().backward()
    (expected * outer).sum().backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=0, atol=2e-5)


def test_chosen_logprob_survives_large_logits() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    value = ChosenLogprob.apply(hidden, torch.tensor([[1000.0], [0.0]]), torch.tensor([1]))
    value.sum().backward()
    assert value.item() == -1000
    assert hidden.grad is not None
    assert hidden.grad.item() == -1000


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapted_map_is_its_formula_with_its_gradients(bias: bool) -> None:
    torch.manual_seed(0)
    shapes = {"x": (7, 5), "weight": (4, 5), "bias": (4,), "down": (2, 5), "up": (4, 2)}
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    for name in ("x", "down", "up"):
        values[name].requires_grad_()
    offset = values["bias"] if bias else None
    arguments = (values["x"], values["weight"], offset, values["down"], values["up"], 1.7)
    expected = values["x"] @ (values["weight"] + 1.7 * values["up"] @ values["down"]).T + (
        values["bias"] if bias else 0
    )
    torch.testing.assert_close(AdaptedMap.apply(*arguments), expected)
    assert torch.autograd.gradcheck(AdaptedMap.apply, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", ["on", "off", "merged"])
def test_an_adapted_layer_is_pefts(dtype: torch.dtype, adapters: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: AdaptedLinear})
    model = get_peft_model(nn.Sequential(nn.Linear(5, 4)).to(dtype), config)
    layer = model.base_model.model[0]
    assert type(layer) is AdaptedLinear
    if adapters == "off":
        model.disable_adapter_layers()
    if adapters == "merged":
        layer.merge()
    x = torch.randn(2, 3, 5, dtype=dtype)
    expected = lora.Linear.forward(layer, x)
    if dtype == torch.float32 and adapters == "on":  # the one case that does not go through peft
        monkeypatch.setattr(lora.Linear, "forward", None)
    torch.testing.assert_close(layer(x), expected)
