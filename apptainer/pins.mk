# What the image is built from by default; Singularity.def says the same, and tests/test_recipe.py compares the two.
BASE          ?= nvcr.io/nvidia/pytorch:25.08-py3
MEGATRON_REPO ?= https://github.com/YoumiMa/Megatron-LM
MEGATRON_REF  ?= 7baa02ba7a13c2385eb2d287fc32c5f3752c4a5b
