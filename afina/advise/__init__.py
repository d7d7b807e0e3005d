"""Whether to fine-tune, and how: measured on the user's own rows before the work is done."""
