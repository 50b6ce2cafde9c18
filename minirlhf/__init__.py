"""minirlhf: reinforcement learning from human feedback, written out in PyTorch.

Read in this order: config, tokenizer, reviews, data, model, run, logprobs, generate, graphs, labelers,
losses, doctor; then the three scripts train_lm.py, train_rm.py and train_ppo.py. Imports only point back.
"""
