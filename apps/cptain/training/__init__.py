"""The Megatron command, its launch, its entry point and its log."""
