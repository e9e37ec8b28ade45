"""Log-probs out of any Hugging Face causal language model, its LM head replaced by the operation."""

from fastpo.head.fused import FusedHead, fused_head, model_logprobs

__all__ = ["FusedHead", "fused_head", "model_logprobs"]
