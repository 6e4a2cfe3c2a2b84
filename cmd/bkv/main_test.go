package main

import (
	"flag"
	"testing"

	"github.com/backup-key-vault/bkv/cmd/internal/commandline"
	"github.com/backup-key-vault/bkv/cmd/internal/readmetest"
)

var update = flag.Bool("update", false, "write the README's tables of commands and flags anew")

// The README's tables are made from command, as the help is.
func TestReadmeListsTheCommands(t *testing.T) {
	commands, shared, err := commandline.Commands(&command{})
	if err != nil {
		t.Fatal(err)
	}
	readmetest.Has(t, "bkv commands", commands, *update)
	readmetest.Has(t, "bkv flags", shared, *update)
}
