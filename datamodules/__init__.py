"""DataModules that stream WebDataset shards, exactly and elastically. They work with any LightningModule."""
