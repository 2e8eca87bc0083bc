# SPDX-License-Identifier: Apache-2.0
"""What the benchmark compares, each engine a program of its own behind one small protocol."""
