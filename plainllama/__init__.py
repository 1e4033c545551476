"""What the stages share: settings, text, tokenizer, data, models as files, machines, generation."""
