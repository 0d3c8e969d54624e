"""Other libraries: each module here touches one of them, and is imported only when it is used.

========================  =========================================================================
``on_import``             what is done to a library as soon as it is imported
``patching``              changes to a library that can be taken back
``transformers``          `from_pretrained`
``conversions``           transformers' table of what checkpoints call its tensors
``expert_names``          where the weights of experts lie in checkpoints
``experts_interface``     the forward of experts
``peft``                  PEFT's adapters on `Linear4bit`
========================  =========================================================================
"""
