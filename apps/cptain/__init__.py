"""cptain: continual pre-training of Hugging Face models with Megatron-LM on HPC clusters, from one run file."""

__version__ = "0.1.0"
