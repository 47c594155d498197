"""Reading a prompt once, however many completions it has: in packed rows, or from a key-value cache.

Packed rows carry gradients, and are how trunks are trained: [prompt | completion | … | prompt | completion | …]. Each
completion attends to its own prompt and to itself, at positions that continue the prompt's; prompts do not see one
another. Through a causal decoder the hidden states are those of each [prompt | completion] alone (tested to 1e-5, in
loss and gradient). A stock model takes such rows through explicit positions and 4-D attention masks, one for each kind
of its layers (`models/families.py`).

The cache holds a prompt's keys and values, and rows of completions go on from there. It is how texts are scored: no
gradient, and however many the completions, hardly any attention that is masked away again.

Where all completions have room for equally many tokens, as those of a policy do, attention over packed rows is taken
apart again (`equal_completions`), so that what would be masked away is not computed.

Shapes: _B rows, _L row length, _C completions.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DynamicCache

from poise.models.families import attention_masks, going_on, has_longrope, steady_context
from poise.models.loading import HfModel

PADDING = -1  # group of tokens that belong to no prompt


class Family(NamedTuple):
    """A prompt with its completions, as token ids."""

    prompt: list[int]
    completions: list[list[int]]


class PackedRows(NamedTuple):
    """Token ids with what a causal decoder needs to keep them apart."""

    ids_BL: Int[Tensor, "rows tokens"]
    position_BL: Int[Tensor, "rows tokens"]
    group_BL: Int[Tensor, "rows tokens"]  # which prompt a token belongs to; PADDING for none
    part_BL: Int[Tensor, "rows tokens"]  # 0 in the prompt, 1, 2, … in its completions
    last_C2: Int[Tensor, "completions 2"]  # (row, column) of each completion's last token, in the order given

    def to(self, device: torch.device) -> "PackedRows":
        return PackedRows(*(tensor.to(device) for tensor in self))


def pack(families: Sequence[Family], pad_id: int, *, one_per_row: bool = False) -> PackedRows:
    """Families in as few rows as first-fit decreasing finds, none longer than the largest family.

    one_per_row: a row for each family; with one completion each, what any causal model reads.
    """
    sizes = [num_tokens(family) for family in families]
    contents = [[i] for i in range(len(families))] if one_per_row else _bins(sizes, max(sizes))
    rows = _fill([[families[i] for i in row] for row in contents], pad_id)
    # Completions lie in the order of the rows; they are wanted in the order given.
    counts = [len(family.completions) for family in families]
    filled = [i for row in contents for i in row]
    starts = dict(zip(filled, itertools.accumulate([0, *(counts[i] for i in filled)]), strict=False))
    order = [starts[i] + j for i in range(len(families)) for j in range(counts[i])]
    return rows._replace(last_C2=rows.last_C2[order])


def _bins(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices in as few groups of at most `capacity` in sum as first-fit decreasing finds."""
    groups: list[list[int]] = []
    free: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        group = next((i for i, room in enumerate(free) if room >= sizes[index]), len(groups))
        if group == len(groups):
            groups.append([])
            free.append(capacity)
        groups[group].append(index)
        free[group] -= sizes[index]
    return groups


def _fill(contents: Sequence[Sequence[Family]], pad_id: int) -> PackedRows:
    """Rows of these families each, in this order, padded on the right."""
    ids = torch.full((len(contents), max(sum(map(num_tokens, row)) for row in contents)), pad_id)
    position, part = torch.zeros_like(ids), torch.zeros_like(ids)
    group = torch.full_like(ids, PADDING)
    last: list[tuple[int, int]] = []
    for row, families in enumerate(contents):
        at = 0
        for index, (prompt, completions) in enumerate(families):
            for number, tokens in enumerate([prompt, *completions]):
                span = slice(at, at + len(tokens))
                start = len(prompt) if number else 0
                ids[row, span] = torch.tensor(tokens, dtype=torch.long)
                position[row, span] = torch.arange(start, start + len(tokens))
                group[row, span], part[row, span] = index, number
                at += len(tokens)
                if number:
                    last.append((row, at - 1))
    return PackedRows(ids, position, group, part, torch.tensor(last))


def num_tokens(family: Family) -> int:
    """Of the prompt and all completions."""
    return len(family.prompt) + sum(map(len, family.completions))


def attends(
    group_BL: Int[Tensor, "rows tokens"], part_BL: Int[Tensor, "rows tokens"]
) -> Bool[Tensor, "rows tokens tokens"]:
    """Who (second axis) sees whom (third): earlier tokens of its prompt and of its own completion, and itself.

    Padding sees earlier padding and itself, so that no softmax is over nothing.
    """
    order = torch.arange(group_BL.shape[1], device=group_BL.device)
    together = group_BL[:, None] == group_BL[:, :, None]
    visible = (part_BL[:, None] == part_BL[:, :, None]) | (part_BL[:, None] == 0)
    return together & visible & (order[None, None] <= order[None, :, None])


# ---- rows [prompt | completion | … | completion] with equally many tokens in each completion ----

EQUAL_COMPLETIONS = "poise_equal_completions"


@contextlib.contextmanager
def equal_completions(model: HfModel, per_prompt: int, tokens: int) -> Iterator[None]:
    """Within it, attention layers of `model` take every row for a prompt and `per_prompt` completions of `tokens` each.

    Masks say what they always said; only what they would mask for all such rows, one completion for another, is not
    computed. Models that do not attend through torch's scaled_dot_product_attention stay as they are.
    """
    before = model.config._attn_implementation
    if before != "sdpa" or not model._supports_attention_backend or per_prompt == 1:
        yield
        return
    AttentionInterface.register(EQUAL_COMPLETIONS, functools.partial(_attend_apart, per_prompt, tokens))
    model.config._attn_implementation = EQUAL_COMPLETIONS
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attend_apart(
    per_prompt: int,
    tokens: int,
    module: nn.Module,
    query: Float[Tensor, "rows heads tokens channels"],
    key: Float[Tensor, "rows key_heads tokens channels"],
    value: Float[Tensor, "rows key_heads tokens channels"],
    attention_mask: Float[Tensor, "rows 1 tokens tokens"],
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "rows tokens heads channels"], None]:
    """Attention of the prompt to itself, and of all completions, side by side, to [prompt | completion]."""
    if others.get("position_bias") is not None:
        whole: Any = AttentionInterface()["sdpa"]
        found: tuple[Tensor, None] = whole(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return found
    start, each = query.shape[2] - per_prompt * tokens, (per_prompt, tokens)
    to_prompt = attention_mask[:, 0, start:, :start].unflatten(1, each)
    to_all = attention_mask[:, 0, start:, start:].unflatten(2, each).unflatten(1, each)
    mask = torch.cat([to_prompt, to_all.diagonal(dim1=1, dim2=3).movedim(-1, 1)], -1).flatten(0, 1).unsqueeze(1)
    parts = [(states[:, :, :start], states[:, :, start:].unflatten(2, each)) for states in (query, key, value)]
    before = [states for states, _ in parts]
    own_mask = attention_mask[:, :, :start, :start]
    prompt = _attend(before[0], before[1], before[2], own_mask, dropout, scaling)
    queries = parts[0][1].transpose(1, 2).flatten(0, 1)  # (rows * per_prompt, heads, tokens, channels)
    keys, values = (
        torch.cat([shared[:, None].expand(-1, per_prompt, -1, -1, -1), after.transpose(1, 2)], 3).flatten(0, 1)
        for shared, after in parts[1:]
    )
    own = _attend(queries, keys, values, mask, dropout, scaling)
    return torch.cat([prompt, own.unflatten(0, (-1, per_prompt)).flatten(1, 2)], 1), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, scaling: float | None
) -> Float[Tensor, "rows tokens heads channels"]:
    """Heads that share keys are queries of the same head: keys need not be repeated."""
    shared = query.shape[1] // key.shape[1]
    queries = query.unflatten(1, (-1, shared)).flatten(2, 3)
    out = F.scaled_dot_product_attention(
        queries, key, value, attn_mask=mask.repeat(1, 1, shared, 1), dropout_p=dropout, scale=scaling
    )
    return out.unflatten(2, (shared, -1)).flatten(1, 2).transpose(1, 2)


# ---- reading packed rows ----


def packed_hidden(classifier: HfModel, rows: PackedRows) -> Float[Tensor, "completions hidden"]:
    """Last hidden state at each completion's last token."""
    sees, position = attends(rows.group_BL, rows.part_BL), rows.position_BL
    return _at_ends(classifier, rows, attention_masks(classifier, sees, position, position, classifier.dtype))


def separate_hidden(classifier: HfModel, rows: PackedRows) -> Float[Tensor, "completions hidden"]:
    """The same for rows of one family of one completion each (`one_per_row`), through any causal model's own mask."""
    mask = (rows.group_BL != PADDING).long()
    if not has_longrope(classifier):
        return _at_ends(classifier, rows, mask)
    long_B = rows.position_BL.amax(-1) >= steady_context(classifier)
    if long_B.all() or not long_B.any():
        return _at_ends(classifier, rows, mask)
    # The longest text of a batch decides how the positions of all are embedded: long texts are read apart.
    long_C = long_B[rows.last_C2[:, 0]]
    short, long = (_at_ends(classifier, _rows_where(rows, kind), mask[kind]) for kind in (~long_B, long_B))
    hidden = short.new_empty(len(long_C), short.shape[-1])
    hidden[~long_C], hidden[long_C] = short, long
    return hidden


def _rows_where(rows: PackedRows, kind_B: Bool[Tensor, " rows"]) -> PackedRows:
    """Some of the rows, with the completions that lie in them."""
    last = rows.last_C2[kind_B[rows.last_C2[:, 0]]]
    number_B = kind_B.cumsum(0) - 1
    ids, position, group, part = (tensor[kind_B] for tensor in rows[:4])
    return PackedRows(ids, position, group, part, torch.stack([number_B[last[:, 0]], last[:, 1]], -1))


def _at_ends(
    classifier: HfModel, rows: PackedRows, mask: Tensor | dict[str, Tensor], cache: DynamicCache | None = None
) -> Float[Tensor, "completions hidden"]:
    hidden = classifier.base_model(
        input_ids=rows.ids_BL, attention_mask=mask, position_ids=rows.position_BL,
        **({"use_cache": False} if cache is None else going_on(classifier.base_model, cache)),
    ).last_hidden_state  # fmt: skip
    each = hidden.unflatten(0, (-1, len(rows.ids_BL)))  # head after head, if heads read them apart; else once
    return each[:, rows.last_C2[:, 0], rows.last_C2[:, 1]].transpose(0, 1).flatten(1)


def cached_hidden(
    classifier: HfModel, families: Sequence[Family], pad_id: int, tokens_per_batch: int
) -> Iterator[tuple[list[tuple[int, int]], Float[Tensor, "completions hidden"]]]:
    """Last hidden states, part by part: ((family, completion) indices, their hidden states).

    Call it under torch.no_grad: it keeps no graph that would be worth having.
    tokens_per_batch: most tokens, padding included, that go through the trunk at once; eight times as many may be
    attended to. Prompts must not be empty.
    """
    order = sorted(range(len(families)), key=lambda i: -len(families[i].prompt))
    while order:
        longest = len(families[order[0]].prompt)
        batch, order = order[: max(tokens_per_batch // longest, 1)], order[max(tokens_per_batch // longest, 1) :]
        cache, seen = _read_prompts(classifier, [families[i].prompt for i in batch], pad_id)
        # Completions of one prompt share rows half as long as it: fewer copies of its keys and values are needed, and
        # what they attend to in vain stays small.
        rows: list[_Row] = []
        for owner, i in enumerate(batch):
            sizes = [len(completion) for completion in families[i].completions]
            for members in _bins(sizes, max(len(families[i].prompt) // 2, *sizes)):
                keys = [(i, j) for j in members]
                texts = [Family([], [families[i].completions[j]]) for j in members]
                rows.append(_Row(owner, keys, texts, sum(sizes[j] for j in members)))
        rows.sort(key=lambda row: -row.length)
        while rows:
            length = rows[0].length
            count = max(min(tokens_per_batch // length, 8 * tokens_per_batch // (longest + length)), 1)
            part, rows = rows[:count], rows[count:]
            filled = _fill([row.texts for row in part], pad_id).to(seen.device)
            owner_B = torch.tensor([row.owner for row in part], device=seen.device)
            hidden = _go_on(classifier, filled, _rows_of(cache, owner_B, len(batch)), seen[owner_B])
            yield [key for row in part for key in row.keys], hidden


class _Row(NamedTuple):
    """Completions of one prompt, to be read in one row."""

    owner: int  # row of the prompt among those read together
    keys: list[tuple[int, int]]  # (family, completion)
    texts: list[Family]
    length: int


def _read_prompts(
    classifier: HfModel, prompts: Sequence[list[int]], pad_id: int
) -> tuple[DynamicCache, Bool[Tensor, "prompts tokens"]]:
    """(keys and values of prompts padded on the left, where there is a token)."""
    device = next(classifier.parameters()).device

    def padded(rows: Iterable[Tensor], value: int) -> Tensor:
        return pad_sequence(list(rows), batch_first=True, padding_value=value, padding_side="left").to(device)

    ids = padded((torch.tensor(prompt) for prompt in prompts), pad_id)
    seen = padded((torch.ones(len(prompt), dtype=torch.long) for prompt in prompts), 0)
    # Without the config: with it, sliding layers would drop keys that the masks of `_go_on` count on.
    cache = DynamicCache()
    classifier.base_model(
        input_ids=ids, attention_mask=seen, position_ids=positions_of(seen), **going_on(classifier.base_model, cache),
    )  # fmt: skip
    return cache, seen.bool()


def _go_on(
    classifier: HfModel, rows: PackedRows, cache: DynamicCache, seen: Bool[Tensor, "rows prompt"]
) -> Float[Tensor, "completions hidden"]:
    """Last hidden states of completions that follow cached prompts, one prompt a row."""
    apart = attends(rows.group_BL, rows.part_BL)
    before = seen[:, None].expand(-1, apart.shape[1], -1)
    position = rows.position_BL + seen.sum(-1, keepdim=True)
    key_position = torch.cat([positions_of(seen), position], -1)
    masks = attention_masks(classifier, torch.cat([before, apart], -1), position, key_position, classifier.dtype)
    return _at_ends(classifier, rows._replace(position_BL=position), masks, cache)


def positions_of(mask: Tensor) -> Int[Tensor, "rows tokens"]:
    """Positions of tokens in rows padded on the left; 0 for padding."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def _rows_of(cache: DynamicCache, index: Int[Tensor, " rows"], prompts: int) -> DynamicCache:
    """A cache of some rows of another, which stays as it is."""
    part = copy.copy(cache)
    layers: list[Any] = [copy.copy(layer) for layer in cache.layers]
    part.layers = layers
    for layer in layers:
        copies = len(keys) // prompts if (keys := getattr(layer, "keys", None)) is not None else 1
        layer.batch_select_indices(torch.cat([index + prompts * number for number in range(copies)]))
    return part
