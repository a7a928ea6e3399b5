"""Free text: tasks whose examples are prompts and answers of any length, or conversations."""
