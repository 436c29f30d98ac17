"""Loops of GPU machine code: their nesting, their instructions, and the order in which a pass reaches them.

The input is the text of ``cuobjdump -sass``. A loop is a natural loop of the flow graph: the target of a backward
branch that dominates its source, and the blocks on the paths between them. Order in memory decides nothing, because the
compiler moves blocks out of line.

The length of a pass is that of one path, so that two alternatives, of which a thread takes one, do not add up. It is
the longest of the paths with the most global accesses of 16 bytes, because paths with narrower accesses are for the
ends of sequences.
"""

import graphlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*[;}]")
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "" if the instruction always executes
    name: str  # with its modifiers, as in "MUFU.EX2"
    operands: str

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def is_global(self) -> bool:
        """Whether it accesses global memory."""
        return self.opcode in ("LDG", "STG")

    @property
    def is_wide(self) -> bool:
        """Whether it accesses 8 or 16 bytes of global memory."""
        return self.is_global and (".64" in self.name or ".128" in self.name)

    @property
    def target(self) -> int | None:
        """The address that a branch may go to."""
        if self.opcode in ("BRX", "JMX", "JMP"):
            raise ValueError(f"{self.address:#x}: {self.name} is not followed")
        # BRA.DIV leaves for a slow version of a shuffle if a warp has diverged, which the kernels exclude.
        found = re.search(r"0x([0-9a-f]+)$", self.operands) if self.opcode == "BRA" and self.name != "BRA.DIV" else None
        return int(found[1], 16) if found else None

    @property
    def continues(self) -> bool:
        """Whether the next instruction may follow."""
        leaves = self.opcode in ("EXIT", "RET") or (self.opcode == "BRA" and re.fullmatch("0x[0-9a-f]+", self.operands))
        return bool(self.predicate) or not leaves


def functions(listing: str) -> dict[str, list[Instruction]]:
    """The instructions of each function, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if "Function :" in line:
            code = found[line.split("Function :")[1].strip()] = []
        elif m := INSTRUCTION.match(line):
            code.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4]))
    return found


def local_accesses(code: Iterable[Instruction]) -> int:
    """The instructions that load from or store to local memory."""
    return sum(i.opcode in LOCAL_MEMORY for i in code)


# --- the flow graph --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Loop:
    header: int  # a block
    blocks: set[int]
    latches: set[int]  # blocks with a branch to the header
    parent: "Loop | None" = None
    children: list["Loop"] = field(default_factory=list)


class Flow:
    """Blocks of one function that a thread can reach, and the loops among them."""

    def __init__(self, code: list[Instruction]) -> None:
        index = {instruction.address: i for i, instruction in enumerate(code)}
        starts = {0}
        for i, instruction in enumerate(code):
            if instruction.target is not None:
                starts.add(index[instruction.target])
            if instruction.target is not None or not instruction.continues:
                starts.add(i + 1)
        edges = sorted(starts & set(range(len(code))))
        self.blocks = {a: code[a:b] for a, b in zip(edges, [*edges[1:], len(code)], strict=True)}
        self.next: dict[int, list[int]] = {}
        for start, block in self.blocks.items():
            last = block[-1]
            after = start + len(block)
            follows = [after] if last.continues and after in self.blocks else []
            self.next[start] = follows + ([] if last.target is None else [index[last.target]])
        self.order = self._reverse_postorder()
        self.loops = self._loops(self._dominators())

    def _reverse_postorder(self) -> list[int]:
        done, seen = [], {0}
        stack = [(0, iter(self.next[0]))]
        while stack:
            block, rest = stack[-1]
            for after in rest:
                if after not in seen:
                    seen.add(after)
                    stack.append((after, iter(self.next[after])))
                    break
            else:
                done.append(block)
                stack.pop()
        return done[::-1]

    def _dominators(self) -> dict[int, int]:
        """The immediate dominator of each block (Cooper, Harvey & Kennedy 2001)."""
        rank = {block: i for i, block in enumerate(self.order)}
        before = defaultdict(list)
        for block in self.order:
            for after in self.next[block]:
                before[after].append(block)
        above, changed = {0: 0}, True
        while changed:
            changed = False
            for block in self.order[1:]:
                known = [b for b in before[block] if b in above]
                best = known[0]
                for other in known[1:]:
                    while best != other:
                        if rank[best] > rank[other]:
                            best = above[best]
                        else:
                            other = above[other]
                if above.get(block) != best:
                    above[block], changed = best, True
        return above

    def _loops(self, above: Mapping[int, int]) -> list[Loop]:
        """All loops, inner ones first; two branches to one header belong to one loop."""

        def dominates(block: int, other: int) -> bool:
            while other not in (block, 0):
                other = above[other]
            return other == block

        before, latches = defaultdict(set), defaultdict(set)
        for block in self.order:
            for after in self.next[block]:
                before[after].add(block)
                if dominates(after, block):
                    latches[after].add(block)
        loops = []
        for header, sources in latches.items():
            blocks, rest = {header}, [*sources]
            while rest:
                block = rest.pop()
                if block not in blocks:
                    blocks.add(block)
                    rest += before[block]
            loops.append(Loop(header, blocks, sources))
        loops.sort(key=lambda loop: len(loop.blocks))
        for i, loop in enumerate(loops):
            loop.parent = next((outer for outer in loops[i + 1 :] if loop.header in outer.blocks), None)
            if loop.parent:
                loop.parent.children.append(loop)
        return loops

    # --- one pass of a loop ---

    def _outermost(self, loop: Loop) -> dict[int, int]:
        """The node of each block in the acyclic graph of a pass, in which an inner loop is one node, its header."""
        node = {block: block for block in loop.blocks}
        for child in loop.children:
            node |= dict.fromkeys(child.blocks, child.header)
        return node

    def _pass(self, loop: Loop) -> dict[int, set[int]]:
        """The predecessors of each node of a pass."""
        node = self._outermost(loop)
        before: dict[int, set[int]] = {n: set() for n in node.values()}
        for block in loop.blocks:
            for after in self.next[block]:
                if after in node and after != loop.header and node[after] != node[block]:
                    before[node[after]].add(node[block])
        return before

    def own_blocks(self, loop: Loop) -> set[int]:
        """The blocks outside of inner loops."""
        return loop.blocks.difference(*(child.blocks for child in loop.children))

    def own_count(self, loop: Loop, wanted: Callable[[Instruction], bool]) -> int:
        """The instructions of a kind outside of inner loops, on all paths."""
        return sum(wanted(i) for block in self.own_blocks(loop) for i in self.blocks[block])

    def _longest_pass(self, loop: Loop, inner: Mapping[Loop, float]) -> tuple[float, list[int]]:
        before, own = self._pass(loop), self.own_blocks(loop)
        weight = {child.header: inner.get(child, 0.0) for child in loop.children}
        best: dict[int, tuple[int, float]] = {}  # (wide accesses, instructions) of the path to the end of a node
        previous: dict[int, int | None] = {}
        for node in graphlib.TopologicalSorter(before).static_order():
            block = self.blocks[node] if node in own else []
            last = max(before[node], key=best.__getitem__, default=None)
            accesses, length = (0, 0.0) if last is None else best[last]
            best[node] = accesses + sum(i.is_wide for i in block), length + (weight.get(node, 0.0) + len(block))
            previous[node] = last
        node_of = self._outermost(loop)
        end: int | None = max((node_of[latch] for latch in loop.latches), key=best.__getitem__)
        assert end is not None
        length, path = best[end][1], []
        while end is not None:
            path += [end] if end in own else []
            end = previous[end]
        return length, path

    def pass_length(self, loop: Loop, inner: Mapping[Loop, float] | None = None) -> float:
        """The instructions of a pass. Each inner loop counts what ``inner`` holds for it, else nothing."""
        return self._longest_pass(loop, inner or {})[0]

    def pass_count(self, loop: Loop, wanted: Callable[[Instruction], bool]) -> int:
        """The instructions of a kind in a pass, outside of inner loops."""
        return sum(wanted(i) for block in self._longest_pass(loop, {})[1] for i in self.blocks[block])

    def alternatives(self, loop: Loop, chosen: Iterable[Loop]) -> set[Loop]:
        """The inner loops that share no pass with any of the chosen ones."""
        before = self._pass(loop)
        headers = {child.header for child in chosen}
        ancestors: dict[int, set[int]] = {}
        for node in graphlib.TopologicalSorter(before).static_order():
            ancestors[node] = set().union(*(ancestors[n] | {n} for n in before[node]))
        return {
            child
            for child in loop.children
            if not any(
                h == child.header or h in ancestors[child.header] or child.header in ancestors[h] for h in headers
            )
        }

    def sequences(self, loop: Loop, wanted: Iterable[Loop]) -> list[list[Loop]]:
        """The inner loops that one pass may run, in order, as longest sequences; alternatives are apart."""
        before, of = self._pass(loop), {child.header: child for child in wanted}
        behind: dict[int, set[int]] = {}  # the wanted loops from which a node is reached
        for node in graphlib.TopologicalSorter(before).static_order():
            behind[node] = set().union(*(behind[n] | ({n} & of.keys()) for n in before[node]))

        def ending_in(header: int) -> list[list[Loop]]:
            previous = {h for h in behind[header] if not any(h in behind[other] for other in behind[header])}
            return [[*s, of[header]] for h in previous for s in ending_in(h)] or [[of[header]]]

        last = [h for h in of if not any(h in behind[other] for other in of)]
        return [sequence for header in last for sequence in ending_in(header)]
