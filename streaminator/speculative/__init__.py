# SPDX-License-Identifier: Apache-2.0
"""What drafts are made of."""
