"""Hugging Face safetensors to Megatron torch_dist, back, and the proof that nothing changed on the way."""
