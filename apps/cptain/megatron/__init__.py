"""What any process needs around Megatron-LM: its import, the CPU in the place of CUDA, its log."""
