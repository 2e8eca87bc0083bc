# SPDX-License-Identifier: Apache-2.0
"""Where it runs; knows nothing about sampling."""
