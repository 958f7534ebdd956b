"""Adapters from peft (LoRA, DoRA, LoHa, LoKr): small trained weights beside a frozen model."""
