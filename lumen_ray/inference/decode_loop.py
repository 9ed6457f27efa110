"""Writing text answers: continuous batching of everything that is asked of one trunk.

Prompts wait in a queue, join the answers that are being written between two steps, and leave as soon as they are done.
Every step is one pass of the LLM over one token of each answer (see `trunk.decoding`).

Behind the routing token of a link in a text, an answer takes the family's queries in place of words, one in each step,
and the words go on behind the last (`TextPrompt.routes`).

There is no thread of its own: whoever waits for an answer takes the next step for all. So several threads may ask at
once, and one that comes with a new image or prompt waits for one step at most. A thread that takes one step after the
other wakes the rest only when an answer is done, or when one of them needs to know of every step.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from lumen_ray.cancellation import giving_way
from lumen_ray.cpu_linear import pack, packed_weights
from lumen_ray.inference.branches import with_regions
from lumen_ray.inference.fair_share import FairShare, Ticket
from lumen_ray.inference.sampling import most_probable, stop_at
from lumen_ray.inference.writing import TextLink, TextPrompt, Writing
from lumen_ray.precision import in_model_dtype
from lumen_ray.structures import Dtype
from lumen_ray.tasks import ROUTING_TOKENS, family_of
from lumen_ray.trunk.decoding import AnswerGroup, DecodingStep, PrefixSlots, Row
from lumen_ray.trunk.layout import build_layout
from lumen_ray.trunk.prefix import Prefix
from lumen_ray.trunk.tokenizer import LumenTokenizer
from lumen_ray.trunk.trunk import Trunk

#: Bytes of the keys and values of answers that are being written, and as many of images. More wait in the queue.
MEMORY = 1 << 30
#: Longest prompt and answer, in tokens, of the first group of answers, and its ratio from group to group. Answers of a
#: group are padded to its longest one.
SHORTEST_GROUP, GROUP_RATIO = 128, 4


class DecodeLoop:
    """Writes the answers of one trunk. Thread-safe."""

    def __init__(
        self,
        trunk: Trunk,
        tokenizer: LumenTokenizer,
        prompt_layout: str = "branches",
        memory: int = MEMORY,
        dtype: Dtype = "float32",
    ):
        """`prompt_layout`, `dtype`: of the model; `memory`: bytes, see `MEMORY`. At least one answer is always
        written."""
        pack(trunk.llm)
        self.trunk = trunk
        self.tokenizer = tokenizer
        self.prompt_layout = prompt_layout
        self.device, self.dtype = trunk.lead.device, dtype
        self._most_tokens = memory // trunk.key_value_bytes
        self._routes = frozenset(tokenizer.ids[token] for token in ROUTING_TOKENS if token in tokenizer.ids)
        self._names = {i: token for token, i in tokenizer.ids.items()}
        self._queue: deque[tuple[Prefix, list[Writing]]] = deque()
        self._active: dict[Row, Writing] = {}
        self._groups: dict[tuple[int, int], AnswerGroup] = {}  # by tokens of the prefix, longest prompt and answer
        self._slots: dict[int, PrefixSlots] = {}  # by tokens of the prefix
        self._changed = threading.Condition()
        self._busy = False  # whether a thread is using the model
        self._busy_since = 0.0
        self._share = FairShare()  # of those who wait with new work
        self._tickets: list[object] = []  # of those who wait in `images`, in their order
        self._held = 0  # prefix tokens, see `images`
        self._arriving = 0  # threads that wait with new work for the model
        self._watching = 0  # threads that need to know of every step

    @property
    def bytes_held(self) -> int:
        """Bytes of keys and values of the answers that are being written and of their images."""
        slots = sum(slots.stored.nbytes for slots in self._slots.values())
        return slots + sum(group.stored.nbytes for group in self._groups.values())

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The model for other work of this thread, such as encoding images. Goes before steps, after one step. Others
        may have the model at `cancellation.between_passes`, and it is taken back after one step."""
        with self._changed:
            ticket = self._share.draw()
            self._take_turn(ticket)
        try:
            self._step()  # so that threads that keep coming do not stop the answers
            with giving_way(partial(self._give_way, ticket)):
                yield
        finally:
            with self._changed:
                self._end_turn(ticket)

    def _give_way(self, ticket: Ticket) -> None:
        with self._changed:
            self._end_turn(ticket, goes_on=True)
            self._take_turn(ticket)
        self._step()

    def _take_turn(self, ticket: Ticket) -> None:
        """Waits until it is the turn of a ticket. The lock is held."""
        try:
            self._await_model(lambda: self._share.is_next(ticket))
        except BaseException:
            self._share.leave(ticket)
            raise
        self._share.begin(ticket)
        self._begin_use()

    def _end_turn(self, ticket: Ticket, goes_on: bool = False) -> None:
        if self._share.turn is not ticket:  # interrupted while others had the model
            return
        self._share.end(goes_on)
        self._busy = False
        self._changed.notify_all()

    def busy_s(self) -> float:
        """Seconds since a thread took the model for its current pass; 0 if none has it."""
        return time.monotonic() - self._busy_since if self._busy else 0.0

    def _begin_use(self) -> None:
        """Takes the model for this thread. Its lock is held."""
        self._busy_since = time.monotonic()
        self._busy = True

    def _await_model(self, is_next: Callable[[], bool] = lambda: True) -> None:
        """Waits until no thread uses the model and `is_next`; goes before the next step. Its lock is held."""
        self._arriving += 1
        try:
            self._changed.wait_for(lambda: not self._busy and is_next())
        finally:
            self._arriving -= 1
            self._changed.notify_all()  # those that wait for the next step, whether this thread goes on or not

    @contextmanager
    def images(self, tokens: int) -> Iterator[None]:
        """Reserves memory for the keys and values of `tokens` prefix tokens, as much as for answers in all. Waits while
        others hold it or came first."""
        ticket = object()
        with self._changed:
            self._tickets.append(ticket)
            try:
                self._changed.wait_for(
                    lambda: (
                        not tokens
                        or self._tickets[0] is ticket
                        and (not self._held or self._held + tokens <= self._most_tokens)
                    )
                )
            finally:
                self._tickets.remove(ticket)
                self._changed.notify_all()
            self._held += tokens
        try:
            yield
        finally:
            with self._changed:
                self._held -= tokens
                self._changed.notify_all()

    def submit(self, prefix: Prefix, prompts: Sequence[TextPrompt]) -> list[Writing]:
        """Enqueues prompts about a batch of images. Answers are written while `wait` is called for any."""
        writings = [Writing(prompt) for prompt in prompts]
        if writings:
            with self._changed:
                self._queue.append((prefix, list(writings)))
        return writings

    def wait(self, writings: Sequence[Writing], on_token: Callable[[Writing], None] | None = None) -> None:
        """Returns when these answers are written. `on_token` is called, in this thread, for each that has new tokens or
        is done. If this or the model raises, the answers are given up, and the error is raised."""
        seen = [0] * len(writings)
        watching = on_token is not None
        with self._changed:
            self._watching += watching
        try:
            while not all(writing.end for writing in writings):
                self._step_or_wait(writings, watching)
                for number, writing in enumerate(writings):
                    if on_token is not None and (now := _progress([writing])) > seen[number]:
                        seen[number] = now
                        on_token(writing)
        finally:
            with self._changed:
                self._watching -= watching
                self._changed.notify_all()  # another thread takes the steps now
            self.cancel(writings)
        for writing in writings:
            if writing.error is not None:
                raise writing.error

    @torch.inference_mode()
    def cancel(self, writings: Sequence[Writing]) -> None:
        """Gives up those of the answers that are not done."""
        if all(writing.end for writing in writings):
            return
        with self._changed:
            self._await_model()
            for writing in writings:
                if writing.end is None:
                    writing.end = "cancelled"
            self._drop_finished()

    def _step_or_wait(self, writings: Sequence[Writing], watching: bool) -> None:
        """Takes the next step, or waits while another thread takes it or has new work: until these answers are done,
        or if `watching` have a new token."""
        before = _progress(writings)

        def has_news() -> bool:
            if watching:
                return _progress(writings) > before
            return all(writing.end for writing in writings)

        with self._changed:
            self._changed.wait_for(lambda: has_news() or not (self._busy or self._arriving))
            if has_news():
                return
            self._begin_use()
        try:
            self._step()
        finally:
            with self._changed:
                self._busy = False
                if self._arriving or self._watching:
                    self._changed.notify_all()

    @in_model_dtype
    def _step(self) -> None:
        """Gives up answers that nobody waits for, admits prompts from the queue, then writes the next token of every
        answer."""
        self._drop_unwanted()
        while (admitted := self._admit()) is not None:
            prefix, writings = admitted
            for wave in self._waves(writings):
                self._guarded(wave, partial(self._begin, prefix, wave))
        if self._active:
            self._guarded(list(self._active.values()), self._next_tokens)

    def _drop_unwanted(self) -> None:
        with self._changed:
            waiting = [writing for _, queued in self._queue for writing in queued]
            unwanted = [writing for writing in (*self._active.values(), *waiting) if not writing.is_wanted()]
            for writing in unwanted:
                writing.end = "cancelled"
            if unwanted:
                self._drop_finished()
                self._changed.notify_all()

    def _admit(self) -> tuple[Prefix, list[Writing]] | None:
        """Takes the prompts from the head of the queue that may join, all about one batch of images."""
        with self._changed:
            if not self._queue:
                return None
            prefix, waiting = self._queue[0]
            admitted = waiting[: self._room(waiting)]
            del waiting[: len(admitted)]
            if not waiting:
                self._queue.popleft()
            return (prefix, admitted) if admitted else None

    def _guarded(self, writings: Sequence[Writing], run: Callable[[], None]) -> None:
        """Runs a pass; if it fails, the answers in it end with its error."""
        try:
            run()
        except BaseException as error:  # raised in the threads that wait for these answers
            for writing in writings:
                if writing.end is None:
                    writing.end, writing.error = "error", error
            if not isinstance(error, Exception):  # such as Ctrl-C, which is this thread's own
                raise
        finally:
            self._drop_finished()
            if any(writing.end for writing in writings):
                with self._changed:
                    self._changed.notify_all()

    def _room(self, waiting: Sequence[Writing]) -> int:
        """The number of waiting prompts that may join: while their memory is free, and at least one in all."""
        taken = sum(_group_length(writing.need) for writing in self._active.values())
        for number, writing in enumerate(waiting):
            taken += _group_length(writing.need)
            if taken > self._most_tokens and (number or self._active):
                return number
        return len(waiting)

    def _waves(self, writings: Sequence[Writing]) -> list[list[Writing]]:
        """Prompts that go through the LLM together: all, or in the sequential layout one of each image."""
        if self.prompt_layout != "sequential":
            return [list(writings)] if writings else []
        waves: list[list[Writing]] = []
        seen: dict[int, int] = {}
        for writing in writings:
            number = seen.get(writing.prompt.branch.image, 0)
            seen[writing.prompt.branch.image] = number + 1
            if number == len(waves):
                waves.append([])
            waves[number].append(writing)
        return waves

    def _begin(self, prefix: Prefix, writings: Sequence[Writing]) -> None:
        """Runs prompts about a batch of images, and chooses the first token of their answers."""
        branches, masks, owners = with_regions(
            (w.prompt.branch, () if w.prompt.region is None else (w.prompt.region,)) for w in writings
        )
        device = prefix.valid.device
        layout = build_layout(branches, len(prefix.valid), self.tokenizer, self.prompt_layout, prefix.valid).to(device)
        last, regions = layout.last_slots, None
        with packed_weights():
            if masks:
                owner = torch.tensor(owners, device=device)
                regions = self.trunk.region_embeddings(prefix, torch.stack(masks).to(device), owner)
            hidden, cache = self.trunk.run_branches(prefix, layout, regions)
            logits = self.trunk.llm.lm_head(hidden[last[:, 0], last[:, 1]])
        self._choose(writings, logits)
        valid = prefix.valid.tolist()
        visible = [prefix.length if has_image else len(self.trunk.lead) for has_image in valid]
        joining: list[tuple[AnswerGroup, Row, Writing, int]] = []
        for number, writing in enumerate(writings):
            if writing.end is not None:
                continue
            image, end = last[number].tolist()
            length = int(layout.offsets[image, end]) + 1
            start = 0 if layout.alone[image] else int(prefix.ends[image])
            row = Row(prefix.cache, image, valid[image], length, start + length)
            group = self._group(0 if layout.alone[image] else visible[image], writing)
            joining.append((group, row, writing, prefix.length + end + 1 - length))
        for group, answers in Counter(group for group, *_ in joining).items():
            group.reserve(answers, cache)
        for group, row, writing, start in joining:
            group.join(row, cache, row.image, start)
            self._active[row] = writing

    def _group(self, visible: int, writing: Writing) -> AnswerGroup:
        key = visible, _group_length(writing.need)
        if key not in self._groups:
            slots = self._slots.setdefault(visible, PrefixSlots(visible)) if visible else None
            self._groups[key] = AnswerGroup(slots)
        return self._groups[key]

    def _next_tokens(self) -> None:
        groups = list(self._groups.values())
        writings = [self._active[row] for group in groups for row in group.rows]
        queries = {n: self._query(link) for n, w in enumerate(writings) if (link := w.open_link) and link.route_read}
        with packed_weights():
            tokens = [writing.tokens[-1] for writing in writings]
            hidden = self.trunk.decode_step(DecodingStep(groups), tokens, queries)
            chosen = [n for n, writing in enumerate(writings) if writing.read(hidden[n])]
            if len(chosen) < len(writings):
                hidden = hidden[chosen]
            logits = self.trunk.llm.lm_head(hidden)
        if chosen:
            self._choose([writings[n] for n in chosen], logits)

    def _query(self, link: TextLink) -> Tensor:
        """The embedding [width] of the next query of a link."""
        return self.trunk.queries.queries[family_of(link.route).name][len(link.states)]

    def _choose(self, writings: Sequence[Writing], logits: Tensor) -> None:
        """Appends the next token of each answer, from logits [N, V], which are changed; ends those that are done."""
        if never := [(number, token) for number, w in enumerate(writings) for token in w.prompt.never]:
            numbers, banned = torch.tensor(never, device=logits.device).T
            logits[numbers, banned] = -torch.inf
        for number, writing in enumerate(writings):
            if only := list(writing.prompt.only):
                kept = logits[number, only]
                logits[number] = -torch.inf
                logits[number, only] = kept
        total = logits.float().logsumexp(-1)
        tokens = logits.argmax(-1).tolist()
        for number, writing in enumerate(writings):
            if not writing.prompt.sampler.is_plain:
                tokens[number] = writing.prompt.sampler.choose(logits[number])
        chosen = torch.tensor(tokens, device=logits.device)[:, None]
        log_probs = (logits.gather(1, chosen)[:, 0].float() - total).tolist()
        tops = most_probable(logits, total, max(w.prompt.sampler.settings.top_log_probs for w in writings))
        for writing, token, log_prob, top in zip(writings, tokens, log_probs, tops, strict=True):
            writing.prompt.sampler.record(token, log_prob, top)
            if token in self.tokenizer.end_ids:
                writing.end = "stop"
                continue
            writing.tokens.append(token)
            stops = writing.prompt.sampler.settings.stop
            if token in self._routes:
                if not writing.begin_link(self._names.get(token, "")):
                    writing.end = "route"
            elif stops and stop_at(self.tokenizer.decode(writing.tokens), stops) is not None:
                writing.end = "stop"
            elif len(writing.tokens) >= writing.prompt.limit:
                writing.end = "length"

    def _drop_finished(self) -> None:
        """Frees the places of answers that are done, in the queue too."""
        with self._changed:
            for _, waiting in self._queue:
                waiting[:] = [writing for writing in waiting if writing.end is None]
            self._queue = deque(entry for entry in self._queue if entry[1])
        for row, writing in list(self._active.items()):
            if writing.end is None:
                continue
            del self._active[row]
            for key, group in list(self._groups.items()):
                if row in group.rows:
                    group.leave(row)
                    if not group.rows:
                        del self._groups[key]


def _progress(writings: Sequence[Writing]) -> int:
    """A number that grows with every token and end."""
    return sum(len(writing.tokens) + (writing.end is not None) for writing in writings)


def _group_length(need: int) -> int:
    """The longest prompt and answer, in tokens, of the group of one that needs `need` tokens."""
    length = SHORTEST_GROUP
    while length < need:
        length *= GROUP_RATIO
    return length
