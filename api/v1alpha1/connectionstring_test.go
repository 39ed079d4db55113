package v1alpha1

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	tokenForm    = "ConnectedRegistryName=edge;SyncTokenName=edge-sync;SyncTokenPassword=hunter2+/==;ParentGatewayEndpoint=contoso.eastus.data.azurecr.io;ParentEndpointProtocol=https"
	identityForm = "ConnectedRegistryName=edge;ManagedIdentityClientId=8f2c;ParentGatewayEndpoint=contoso.eastus.data.azurecr.io;ParentEndpointProtocol=https"
)

func TestConnectionString(t *testing.T) {
	got, err := ParseConnectionString(tokenForm + ";")
	if err != nil {
		t.Fatal(err)
	}
	want := ConnectionString{
		RegistryName: "edge", SyncTokenName: "edge-sync", SyncTokenPassword: "hunter2+/==",
		ParentGatewayEndpoint: "contoso.eastus.data.azurecr.io", ParentEndpointProtocol: "https",
	}
	if got != want {
		t.Errorf("parsed %+v", got.Reveal())
	}
	if diff := cmp.Diff(tokenForm, got.Reveal()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	identity, err := ParseConnectionString(identityForm)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(identityForm, identity.Reveal()); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestConnectionStringHidesItsPassword(t *testing.T) {
	cs, err := ParseConnectionString(tokenForm)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%v %+v %#v %s %q", cs, cs, cs, cs, cs)
	fmt.Fprintf(&b, "%v %+v", &cs, struct{ C ConnectionString }{cs})
	slog.New(slog.NewTextHandler(&b, nil)).Info("a", "b", cs)
	slog.New(slog.NewJSONHandler(&b, nil)).Info("a", "b", cs)
	if strings.Contains(b.String(), "hunter2") {
		t.Error(b.String())
	}
}

func TestLoginServer(t *testing.T) {
	for gateway, want := range map[string]string{
		"contoso.eastus.data.azurecr.io":      "contoso.azurecr.io",
		"contoso-a1b2.eastus.data.azurecr.io": "contoso-a1b2.azurecr.io",
		"contoso.chinaeast2.data.azurecr.cn":  "contoso.azurecr.cn",
		"contoso.azurecr.io":                  "contoso.azurecr.io",
		"192.168.0.10:443":                    "192.168.0.10:443",
		"edge.example.com":                    "edge.example.com",
	} {
		if got := (ConnectionString{ParentGatewayEndpoint: gateway}).LoginServer(); got != want {
			t.Errorf("%s: %s, want %s", gateway, got, want)
		}
	}
}

func TestConnectionStringErrors(t *testing.T) {
	keys := "ConnectedRegistryName, SyncTokenName, SyncTokenPassword, ManagedIdentityClientId, ParentGatewayEndpoint, ParentEndpointProtocol"
	for s, want := range map[string]string{
		"":  "part 1 is not KEY=VALUE with one of the keys " + keys,
		";": "part 1 is not KEY=VALUE with one of the keys " + keys,
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=hun;hunter2=;ParentGatewayEndpoint=c": "part 4 is not KEY=VALUE with one of the keys " + keys,
		"ConnectedRegistryName=a;SyncTokenPasswort=hunter2":                                              "part 2 has an unknown key: did you mean SyncTokenPassword?",
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=hunter2;SyncTokenPassword=hunter2":    "SyncTokenPassword occurs twice",
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=":                                     "SyncTokenPassword is empty",
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=hunter2\n":                            "SyncTokenPassword has a space or line end in it",
		"ConnectedRegistryName=a;SyncTokenName=b;ParentGatewayEndpoint=c;ParentEndpointProtocol=https":   "SyncTokenPassword is missing",
		"SyncTokenName=b":         "ConnectedRegistryName is missing",
		"ConnectedRegistryName=a": "SyncTokenName is missing",
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=hunter2":                                                                                "ParentGatewayEndpoint is missing",
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=hunter2;ParentGatewayEndpoint=c":                                                        "ParentEndpointProtocol must be http or https",
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=hunter2;ParentGatewayEndpoint=https://c;ParentEndpointProtocol=https":                   "ParentGatewayEndpoint is not a host with or without a port",
		"ConnectedRegistryName=a;SyncTokenName=b:hunter2;SyncTokenPassword=hunter2;ParentGatewayEndpoint=c;ParentEndpointProtocol=https":                   "SyncTokenName has a colon in it",
		"ConnectedRegistryName=a;SyncTokenName=b;SyncTokenPassword=hunter2;ManagedIdentityClientId=d;ParentGatewayEndpoint=c;ParentEndpointProtocol=https": "has both ManagedIdentityClientId and a sync token: only one of them can be used",
	} {
		_, err := ParseConnectionString(s)
		if err == nil || err.Error() != "connection string: "+want {
			t.Errorf("%q: %v\nwant %s", s, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Error("the error gives the password away")
		}
	}
}

func FuzzConnectionString(f *testing.F) {
	f.Add(tokenForm)
	f.Add(identityForm)
	f.Add("SyncTokenPassword=hunter2;hunter2")
	f.Fuzz(func(t *testing.T, s string) {
		cs, err := ParseConnectionString(s)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("several lines: %q", err)
			}
			return
		}
		again, err := ParseConnectionString(cs.Reveal())
		if err != nil || again != cs {
			t.Errorf("%q does not survive printing: %v", s, err)
		}
		if cs.LoginServer() == "" {
			t.Errorf("%q has no login server", s)
		}
	})
}
