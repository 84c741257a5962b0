"""Checkpoints of other projects, read as weights of networks of ours. published: ReActNet and BNN_NoBN."""
