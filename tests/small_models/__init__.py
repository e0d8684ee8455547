"""Small models with random weights, and what can be added to them: LoRAs, embeddings and ControlNets."""
