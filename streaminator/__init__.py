# SPDX-License-Identifier: Apache-2.0
"""Draw many completions per prompt, each drafted from the ones before it."""

__version__ = "0.1.0"
