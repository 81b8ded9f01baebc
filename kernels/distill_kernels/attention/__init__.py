"""Attention of queries over tokens: dense, packed, cross, and cross-attention pooling."""
