# SPDX-License-Identifier: Apache-2.0
"""Text that is none: half a surrogate pair, which no tokenizer, file or hash can take.

Used by: `streaminator.config_check`, `sampler_pool`, `data.prompts`, `speculative.replay_log`.
"""


def half_a_pair(text: str) -> int | None:
    """Where the first one is; None: nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
