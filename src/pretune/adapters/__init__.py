"""Adapters: small weights trained beside a frozen model (LoRA, DoRA, LoHa, LoKr), by peft."""
