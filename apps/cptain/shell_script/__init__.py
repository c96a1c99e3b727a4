"""Shell scripts that start Megatron's pretrain_gpt.py, read and made into run files."""
