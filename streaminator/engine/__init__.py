# SPDX-License-Identifier: Apache-2.0
"""The stream: one process, one model. Start reading at `engine.Engine.step`."""
