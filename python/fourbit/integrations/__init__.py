"""Other libraries: each module here touches one of them, and is imported only when it is used.

========================  =========================================================================
``transformers``          `from_pretrained`
``conversions``           transformers' table of what checkpoints call its tensors
``expert_names``          where the weights of experts lie in checkpoints
``experts_interface``     the forward of experts
========================  =========================================================================
"""
