# SPDX-License-Identifier: Apache-2.0
"""Which KV block belongs to whom: reference counts and the prefix cache. No tensors.

Invariants
- Block accounting: free + referenced = total; checked by `check_integrity`.
- Block 0 is never handed out: it stands for "nowhere" in padded tables.
- A full block of prompt tokens is found again by its content and everything before it, as long
  as its memory has not been handed out anew. That stores a common preamble once.

Used by: `scheduler.Scheduler`.
"""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

NULL_BLOCK = 0


class BlockManager:
    """Reference-counted pool of `num_blocks` blocks of `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._num_references = [0] * num_blocks
        # The next to hand out first. A freed block that can be found by its content keeps it as long
        # as possible; others are taken again at once, so that a stream touches little memory.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._block_of_key: dict[bytes, int] = {}
        self._key_of_block: dict[int, bytes] = {}
        self._handed_out: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks that somebody holds."""
        return self.num_blocks - 1 - len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` tokens fill."""
        return -(-num_tokens // self.block_size)

    def allocate(self, num: int) -> list[int]:
        """Hand out `num` blocks; the caller checked `num_free`."""
        assert num <= self.num_free, f"{num} blocks asked, {self.num_free} free"
        blocks = []
        for _ in range(num):
            block, _none = self._free.popitem(last=False)
            key = self._key_of_block.pop(block, None)
            if key is not None:
                del self._block_of_key[key]
            self._num_references[block] = 1
            blocks.append(block)
        self._handed_out.extend(blocks)
        return blocks

    def take_handed_out(self) -> list[int]:
        """Blocks allocated since the last call: they hold what their last owner left."""
        blocks, self._handed_out = self._handed_out, []
        return blocks

    def grow(self, num_blocks: int) -> None:
        """Add blocks, up to `num_blocks`."""
        self._free.update(dict.fromkeys(range(self.num_blocks, num_blocks)))
        self._num_references.extend([0] * (num_blocks - self.num_blocks))
        self.num_blocks = num_blocks

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block; a free one that is still cached comes back to life."""
        for block in blocks:
            if self._num_references[block] == 0:
                del self._free[block]
            self._num_references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each block."""
        # Backwards, so that the tail of a prefix is handed out before its head.
        for block in reversed(blocks):
            assert self._num_references[block] > 0, f"block {block} freed twice"
            self._num_references[block] -= 1
            if self._num_references[block] == 0:
                self._free[block] = None
                if block not in self._key_of_block:
                    self._free.move_to_end(block, last=False)

    def prefix_keys(self, token_ids: Sequence[int]) -> list[bytes]:
        """One key per full block of `token_ids`; equal keys mean equal tokens up to there."""
        keys = []
        key = b""
        size = self.block_size
        for start in range(0, len(token_ids) - size + 1, size):
            content = ",".join(map(str, token_ids[start : start + size]))
            key = blake2b(content.encode(), key=key, digest_size=16).digest()
            keys.append(key)
        return keys

    def cached_blocks(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks holding the longest known prefix of `keys`; not yet shared."""
        blocks = []
        for key in keys:
            block = self._block_of_key.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Make a computed block findable by its content; the first of equals is kept."""
        if key not in self._block_of_key and block not in self._key_of_block:
            self._block_of_key[key] = block
            self._key_of_block[block] = key

    def forget(self) -> None:
        """Find no block by its content any more: the weights it was computed with have changed."""
        self._block_of_key.clear()
        self._key_of_block.clear()

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Raise AssertionError unless `tables`, all that are held, explain every reference."""
        expected = [0] * self.num_blocks
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._num_references, "reference counts do not match the block tables"
        referenced = sum(count > 0 for count in expected)
        assert referenced + self.num_free == self.num_blocks - 1, "blocks were lost"
        assert all(self._num_references[block] == 0 for block in self._free)
        assert self._block_of_key == {key: block for block, key in self._key_of_block.items()}
