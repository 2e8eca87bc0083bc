# SPDX-License-Identifier: Apache-2.0
"""Ray wrappers around the library."""
