# SPDX-License-Identifier: Apache-2.0
"""Prompts in, Parquet out."""
