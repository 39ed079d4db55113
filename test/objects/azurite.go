package objects

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
)

// AzureAccount is the storage account of an Azurite.
const AzureAccount = "connected"

// AzureKey is its access key.
var AzureKey = base64.StdEncoding.EncodeToString([]byte("not a secret at all, but 32 long"))

// StartAzurite starts an Azurite that keeps its data in a directory. `npm ci` in
// the directory azurite installs it.
func StartAzurite(ctx context.Context, data string) (*Server, error) {
	_, file, _, _ := runtime.Caller(0)
	program := filepath.Join(filepath.Dir(file), "azurite", "node_modules", ".bin", "azurite-blob")
	if _, err := os.Stat(program); err != nil {
		return nil, errors.New("Azurite is not installed: make objects does it")
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	host, port, _ := net.SplitHostPort(address)
	s := &Server{URL: "http://" + address + "/" + AzureAccount}
	s.command = func() *exec.Cmd {
		// The version of the protocol that our library speaks may be newer.
		cmd := exec.Command("node", program, "--blobHost", host, "--blobPort", port, "--location", data, "--silent", "--skipApiVersionCheck", "--disableTelemetry")
		cmd.Env = append(os.Environ(), "AZURITE_ACCOUNTS="+AzureAccount+":"+AzureKey)
		return cmd
	}
	s.ready = answers(newClient(nil), s.URL+"?comp=list", http.StatusForbidden)
	if err := s.start(ctx); err != nil {
		return nil, fmt.Errorf("Azurite: %w", err)
	}
	return s, nil
}
