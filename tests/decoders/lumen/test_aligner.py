"""The aligner against its equations written out prompt by prompt."""

import math

import pytest
import torch
from support.tiny_models import scrambled

from lumen_ray.decoders.common.ragged import Seats
from lumen_ray.decoders.lumen.aligner import Aligner, sine_position

C, HEADS, SHAPE = 16, 4, (3, 5)


def written_out(aligner, token, places, position):
    """One prompt: token [C], places [L, C]; Lumen, sec. 3.2, with a softmax over {token, nothing}."""
    for layer in aligner.layers:
        normed = layer.place_norm(places)
        keys, values = layer.place_key_value(normed + position).chunk(2, dim=-1)
        asks = layer.token_query(layer.token_norm(token))
        read = []
        for h in range(HEADS):
            part = slice(h * C // HEADS, (h + 1) * C // HEADS)
            weight = torch.softmax(keys[:, part] @ asks[part] / math.sqrt(C // HEADS), dim=0)
            read.append(weight @ values[:, part])
        token = token + layer.token_out(torch.cat(read))
        token = token + layer.token_mlp(token)
        key, value = layer.token_key_value(token).chunk(2)
        asks, answers = layer.place_query(normed), []
        for h in range(HEADS):
            part = slice(h * C // HEADS, (h + 1) * C // HEADS)
            scores = torch.stack([asks[:, part] @ key[part], asks[:, part] @ layer.null_key[h]], dim=1)
            weight = torch.softmax(scores / math.sqrt(C // HEADS), dim=1)[:, 0]
            answers.append(weight[:, None] * value[part])
        places = places + layer.place_out(torch.cat(answers, dim=1))
    return token, places


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("images", [[0, 0, 0], [1, 0, 1, 2, 1], [2]])
def test_prompts_and_places_read_each_other_as_written_out(num_layers, images):
    aligner = scrambled(Aligner(C, HEADS, num_layers))
    torch.manual_seed(0)
    tokens, places = torch.randn(len(images), C), torch.randn(3, SHAPE[0] * SHAPE[1], C)
    position = sine_position(*SHAPE, C, torch.device("cpu"))
    with torch.no_grad():
        found, parts = aligner(tokens, places, torch.tensor(images), position)
        whole = parts.whole()
        for p, image in enumerate(images):
            token, own = written_out(aligner, tokens[p], places[image], position)
            torch.testing.assert_close(found[p], token, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(whole[p], own, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_places_in_parts_are_as_in_whole(num_layers):
    aligner = scrambled(Aligner(C, HEADS, num_layers))
    torch.manual_seed(0)
    images = torch.tensor([1, 0, 1, 2, 1])
    tokens, places, words = torch.randn(5, C), 3 * torch.randn(3, SHAPE[0] * SHAPE[1], C) + 2, torch.randn(5, C)
    norm = scrambled(torch.nn.LayerNorm(C))
    with torch.no_grad():
        _, parts = aligner(tokens, places, images, sine_position(*SHAPE, C, torch.device("cpu")))
        whole = parts.whole()
        expected = torch.einsum("plc,pc->pl", norm(whole), words)
        torch.testing.assert_close(parts.matched(norm, words), expected, atol=1e-4, rtol=1e-4)
        prompts, at = torch.tensor([3, 0, 3]), torch.tensor([14, 2, 0])
        torch.testing.assert_close(parts.at(prompts, at), whole[prompts, at], atol=1e-5, rtol=1e-5)


def test_no_prompts_are_no_prompts():
    aligner = Aligner(C, HEADS, 2)
    tokens, places = aligner(torch.zeros(0, C), torch.zeros(2, 15, C), torch.zeros(0, dtype=torch.long), None)
    assert tokens.shape == (0, C) and places.whole().shape == (0, 15, C)
    norm = torch.nn.LayerNorm(C)
    assert places.matched(norm, torch.zeros(0, C)).shape == (0, 15)


def test_seats_are_unique():
    row = torch.tensor([1, 0, 1, 3, 1])
    seats = Seats.of(row, 4)
    assert seats.shape == (4, 3) and seats.seat.tolist() == [0, 0, 1, 0, 2]
    values = torch.arange(10.0).view(5, 2)
    assert torch.equal(seats.take(seats.fill(values)), values)
    assert seats.fill(values).sum() == values.sum()
