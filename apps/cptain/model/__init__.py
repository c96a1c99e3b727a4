"""What a model is: its architecture from config.json, the families that are known, sizes and vocabulary."""
