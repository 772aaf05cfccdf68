"""Bytes beyond fast memory, in extents under a hard budget: what they hold is the caller's, as optimizer states are.

`Pager` keeps the page table and lends frames, `schedule` is its policy, `tiers` are where extents live outside of the
frames. With files native code may move them (`Pager.native_pass`).
"""
