# SPDX-License-Identifier: Apache-2.0
"""Entry points, run as `python -m jobs.NAME` from the checkout."""
