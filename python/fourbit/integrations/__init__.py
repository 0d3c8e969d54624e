"""Other libraries: all that touches them is here, and loaded only when they are.

========================  =========================================================================
``versions``              which versions of them are supported
``on_import``             what is done to a library as soon as it is imported
``patching``              changes to a library that can be taken back
``transformers``          `from_pretrained`, `NF4Config` and the quantizer behind it
``conversions``           transformers' table of what checkpoints call its tensors
``expert_names``          where the weights of experts lie in checkpoints
``experts_interface``     the forward of experts
``peft``                  PEFT's adapters on `Linear4bit`
``trainer``               `PagedAdamW` for bitsandbytes' optimizers of Trainer
``bitsandbytes``          `replace_bitsandbytes`, `restore_bitsandbytes`
========================  =========================================================================
"""
